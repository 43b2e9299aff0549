"""How far a batch of prompts is: on a terminal, or by a bar of the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

from tsqp_shm.errors import RequestError
from tsqp_shm.progress import Progress
from tsqp_shm.scalars import flag
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.updates import Update

# What is done before shows nothing.
_SHOWN_AFTER_S = 1.0
Bar = bool | Callable[..., Any]


def checked_bar(use_tqdm: object) -> Bar:
    """Raises:
    RequestError: it is neither a flag nor what makes a bar.
    """
    bar = flag(use_tqdm)
    if bar is None:
        if not callable(use_tqdm):
            raise RequestError("use_tqdm", use_tqdm, "True, False, or what makes a bar as tqdm does", is_mistyped=True)
        return use_tqdm
    return bar


@contextmanager
def awaited(bar: Bar, completions: Sequence[Completion], ended: SimpleQueue[Update]) -> Iterator[Iterator[Update]]:
    """Gives the last update of each completion, as they end, and shows how many have.

    Args:
        bar: True for a line on stderr, where that is a terminal; what makes a bar is called as vLLM calls tqdm.
    """
    if callable(bar):
        theirs = bar(total=len(completions), desc="Processed prompts")
        try:
            yield _counted(theirs, completions, ended)
        finally:
            theirs.close()
        return
    with Progress(quiet=not bar) as line:
        yield _shown(line, completions, ended) if line.is_shown else (ended.get() for _ in completions)


def _counted(bar: Any, completions: Sequence[Completion], ended: SimpleQueue[Update]) -> Iterator[Update]:
    for _ in completions:
        # Nothing here keeps an update: the error in it has the frames that wait for this generator.
        yield ended.get()
        bar.update(1)


def _shown(line: Progress, completions: Sequence[Completion], ended: SimpleQueue[Update]) -> Iterator[Update]:
    started_s = time.monotonic()
    for done in range(len(completions)):
        while True:
            try:
                yield ended.get(timeout=_SHOWN_AFTER_S)
                break
            except Empty:
                tokens = sum(len(completion.token_ids) for completion in completions)
                waited_s = time.monotonic() - started_s
                line.show(f"{done} of {len(completions)} prompts, {tokens:,} tokens, {waited_s:.0f} s")
