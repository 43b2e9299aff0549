"""What one forward pass gives the completions that take part in it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tsqp_shm import _native
from tsqp_shm.errors import NumericsError, ProtocolError
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.ops import Float32
from tsqp_shm.tee.sampler import TokenScore, draw_tokens, score_tokens
from tsqp_shm.tee.statistics import Statistics


class _Row(NamedTuple):
    """A row of logits that somebody wants.

    Attributes:
        token_id: of the prompt, which the row is to score; None: a token is drawn from it.
    """

    completion: Completion
    token_id: int | None


class Harvest:
    """Reads the logits of a pass, a slot's worth at a time, and gives completions nothing before all are read: a fault
    in one row is one of the whole pass.

    Args:
        are_own: whether the numbers are this process's own. What is none of them is a request's affair then, and else
            the GPU process's.
    """

    def __init__(self, batch: Sequence[tuple[Completion, Chunk]], statistics: Statistics, *, are_own: bool) -> None:
        self._statistics = statistics
        self._are_own = are_own
        self._rows = [
            _Row(completion, completion.scored_token(position))
            for completion, chunk in batch
            for position in chunk.wanted_positions
        ]
        self._drawn: dict[Completion, int] = {}
        self._scores: dict[Completion, TokenScore] = {}
        self._prompt_scores: defaultdict[Completion, list[TokenScore]] = defaultdict(list)
        self._failed: set[Completion] = set()

    def take(self, first: int, logits: Float32) -> None:
        """Raises:
        ProtocolError: they are no numbers, and not this process's own.
        """
        started_ns = time.perf_counter_ns()
        rows = self._rows[first : first + len(logits)]
        drawing = [index for index, row in enumerate(rows) if row.token_id is None]
        if drawing:
            completions = [rows[index].completion for index in drawing]
            tokens = draw_tokens(_rows_of(logits, drawing), [completion.sampler for completion in completions])
            drawn = dict(zip(completions, tokens, strict=True))
            self._fail(completion for completion, token_id in drawn.items() if token_id == _native.NOT_FINITE)
            self._drawn.update(drawn)
        self._score(rows, logits)
        self._statistics.count("SAMPLE", started_ns)

    def _score(self, rows: Sequence[_Row], logits: Float32) -> None:
        """All that want as many of the likeliest tokens in one call."""
        by_top: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for index, (completion, token_id) in enumerate(rows):
            params = completion.params
            top = params.logprobs if token_id is None else params.prompt_logprobs
            scored = self._drawn[completion] if token_id is None else token_id
            if top is not None and scored >= 0 and completion not in self._failed:
                by_top[top].append((index, scored))
        for top, asked in by_top.items():
            try:
                self._score_rows(rows, logits, top, asked)
            except ValueError:
                finite = [bool(np.isfinite(row).all()) for row in logits]
                self._fail(rows[index].completion for index, _ in asked if not finite[index])
                left = [(index, scored) for index, scored in asked if rows[index].completion not in self._failed]
                self._score_rows(rows, logits, top, left)

    def _score_rows(self, rows: Sequence[_Row], logits: Float32, top: int, asked: Sequence[tuple[int, int]]) -> None:
        indices = [index for index, _ in asked]
        scores = score_tokens(_rows_of(logits, indices), [token_id for _, token_id in asked], top)
        for index, score in zip(indices, scores, strict=True):
            completion, token_id = rows[index]
            if token_id is None:
                self._scores[completion] = score
            else:
                self._prompt_scores[completion].append(score)

    def _fail(self, completions: Iterable[Completion]) -> None:
        """Raises:
        ProtocolError: there are any, and the numbers are not this process's own.
        """
        failed = set(completions)
        if failed and not self._are_own:
            raise ProtocolError("logits", "finite numbers", "NaN or infinity; --check-finite says where they began")
        self._failed |= failed

    def give(self, completion: Completion) -> bool:
        """Has a completion take what the pass has for it. Returns whether it has grown."""
        if completion in self._failed:
            completion.fail(NumericsError("logits"))
            return False
        completion.score_prompt(self._prompt_scores.get(completion, ()))
        if completion not in self._drawn:
            return False
        token_id = self._drawn[completion]
        if token_id == _native.NOTHING_LEFT:
            completion.refuse_rules()
            return False
        completion.grow(token_id, self._scores.get(completion))
        return True


def _rows_of(logits: Float32, indices: Sequence[int]) -> Float32:
    # A copy only where not all are wanted.
    return logits if len(indices) == len(logits) else logits[list(indices)]
