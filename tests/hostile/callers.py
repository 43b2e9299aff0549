"""What a caller is told of a completion, errors included."""

from __future__ import annotations

from queue import SimpleQueue

from tsqp_shm import LLM
from tsqp_shm.errors import TsqpError
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.updates import Update


def told_of(llm: LLM, completion: Completion, queue: SimpleQueue[Update]) -> list[Update]:
    """All updates until the last one; an error that is raised in place of one as one that carries it."""
    told: list[Update] = []
    while not told or not told[-1].is_last:
        try:
            told.append(llm.runtime.next_update(queue))
        except TsqpError as error:
            told.append(Update(completion, error=error))
    return told
