"""What one forward pass gives the completions that take part in it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from tsqp_shm import _native
from tsqp_shm.errors import NumericsError, ProtocolError
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.ops import Float32
from tsqp_shm.tee.sampler import TokenScore, draw_tokens, score_tokens
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.verification import Unverified


class _Row(NamedTuple):
    """A row of logits that somebody wants.

    Attributes:
        token_id: of the prompt, which the row is to score; None: a token is drawn from it.
    """

    completion: Completion
    token_id: int | None


class _Asked(NamedTuple):
    """A row of an array of logits that is to say something of a token.

    Attributes:
        top: how many of the likeliest tokens too.
    """

    completion: Completion
    row: int
    token_id: int
    top: int


class _Scored(NamedTuple):
    """What rows say of tokens, in their order, and whose rows hold what is no number."""

    scores: list[tuple[Completion, TokenScore]]
    failed: set[Completion]


class _Piece(NamedTuple):
    """What is kept of some rows of a pass.

    Attributes:
        drawing: whose next tokens are drawn, one from each row of `logits`.
    """

    prompt: _Scored
    drawing: list[Completion]
    logits: Float32


class Harvest:
    """Reads the logits of a pass, a slot's worth at a time; when the pass is over, brings in what there is for
    completions: a fault in one row is one of the whole pass.

    Args:
        are_own: whether the numbers are this process's own, or checked. What is none of them is a request's affair
            then, and else the GPU process's.
    """

    def __init__(self, batch: Sequence[tuple[Completion, Chunk]], statistics: Statistics, *, are_own: bool) -> None:
        self._statistics = statistics
        self._are_own = are_own
        self._rows = [
            _Row(completion, completion.scored_token(position))
            for completion, chunk in batch
            for position in chunk.wanted_positions
        ]
        self._pieces: list[Unverified[_Piece]] = []
        self._drawn: dict[Completion, int] = {}
        self._scores: dict[Completion, TokenScore] = {}
        self._prompt_scores: defaultdict[Completion, list[TokenScore]] = defaultdict(list)
        self._failed: set[Completion] = set()

    def take(self, first: int, logits: Unverified[Float32]) -> None:
        """Rows of the pass from that one on; nothing is drawn from them yet."""
        self._pieces.append(logits.map(partial(self._read, first)))

    def _read(self, first: int, logits: Float32) -> _Piece:
        end = first + len(logits)
        rows = self._rows[first:end]
        asked = [
            _Asked(completion, row, token_id, completion.params.prompt_logprobs)
            for row, (completion, token_id) in enumerate(rows)
            if token_id is not None and completion.params.prompt_logprobs is not None
        ]
        drawing = [index for index, row in enumerate(rows) if row.token_id is None]
        drawn_from = _rows_of(logits, drawing)
        if drawn_from is logits and end < len(self._rows):
            # The array is used again for the rows that follow.
            drawn_from = logits.copy()
        return _Piece(_score(logits, asked), [rows[index].completion for index in drawing], drawn_from)

    def bring_in(self) -> None:
        """Opens what was read, and draws from it. To be called when the pass is over.

        Raises:
            ProtocolError: logits are no numbers, and not this process's own.
        """
        started_ns = time.perf_counter_ns()
        for unverified in self._pieces:
            piece = unverified.open()
            self._fail(piece.prompt.failed)
            for completion, score in piece.prompt.scores:
                self._prompt_scores[completion].append(score)
            if piece.drawing:
                self._draw(piece.drawing, piece.logits)
        self._statistics.count("SAMPLE", started_ns)

    def _draw(self, completions: Sequence[Completion], logits: Float32) -> None:
        tokens = draw_tokens(logits, [completion.sampler for completion in completions])
        self._drawn.update(zip(completions, tokens, strict=True))
        self._fail(completion for completion in completions if self._drawn[completion] == _native.NOT_FINITE)
        asked = [
            _Asked(completion, row, token_id, completion.params.logprobs)
            for row, (completion, token_id) in enumerate(zip(completions, tokens, strict=True))
            if completion.params.logprobs is not None and token_id >= 0
        ]
        scored = _score(logits, asked)
        self._fail(scored.failed)
        self._scores.update(scored.scores)

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


def _score(logits: Float32, asked: Sequence[_Asked]) -> _Scored:
    """All that want as many of the likeliest in one call."""
    by_top: defaultdict[int, list[_Asked]] = defaultdict(list)
    for each in asked:
        by_top[each.top].append(each)
    scores: list[tuple[Completion, TokenScore]] = []
    failed: set[Completion] = set()
    for top, of_top in by_top.items():
        try:
            scores += _score_rows(logits, of_top, top)
        except ValueError:
            finite = [bool(np.isfinite(row).all()) for row in logits]
            failed |= {each.completion for each in of_top if not finite[each.row]}
            scores += _score_rows(logits, [each for each in of_top if each.completion not in failed], top)
    return _Scored(scores, failed)


def _score_rows(logits: Float32, asked: Sequence[_Asked], top: int) -> list[tuple[Completion, TokenScore]]:
    found = score_tokens(_rows_of(logits, [each.row for each in asked]), [each.token_id for each in asked], top)
    return [(each.completion, score) for each, score in zip(asked, found, strict=True)]


def _rows_of(logits: Float32, indices: Sequence[int]) -> Float32:
    # A copy only where not all are wanted.
    return logits if len(indices) == len(logits) else logits[list(indices)]
