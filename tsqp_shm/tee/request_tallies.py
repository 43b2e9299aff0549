"""What a session's requests come to: counted by the thread that runs the steps, read by any.

Nothing here is locked: one thread writes, each number is replaced whole, and a reader may see numbers of two moments of
one step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from tsqp_shm.metrics import Histogram

if TYPE_CHECKING:
    from tsqp_shm.tee.completion import Completion

# Seconds and tokens: bounds enough for a quantile, and few enough to be sent every few seconds.
_SECONDS = tuple(float(f"{step}e{power}") for power in range(-3, 4) for step in (1, 2.5, 5))
_TOKENS = tuple(float(step * 10**power) for power in range(7) for step in (1, 2, 5))
# How a completion may have ended, and vLLM's word where it has another.
ENDINGS = {"stop": "stop", "length": "length", "deadline": "deadline", "cancelled": "abort", "error": "error"}


class Distribution:
    """Observations, counted by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def histogram(self, name: str) -> Histogram:
        return histogram(name, self._bounds, list(self._counts), self._sum)


def histogram(name: str, bounds: Sequence[float], counts: Sequence[int], total: float) -> Histogram:
    """Args:
    counts: of the observations up to each bound and above the one before; one more for those above all.
    """
    so_far = list(accumulate(counts))
    # As Prometheus writes them.
    labels = [*(repr(float(bound)) for bound in bounds), "+Inf"]
    return Histogram(name, {}, so_far[-1], total, dict(zip(labels, so_far, strict=True)))


class RequestTallies:
    """Attributes:
    prompt_tokens: of prompts that have been read, each with the first token of its answer.
    generation_tokens: of answers.
    begun_tokens, cached_tokens: of prompts that have been begun, and how many of these lay in a cache already.
    ended: how many have ended, by how.
    first_token_s, between_tokens_s, whole_s, queue_s: seconds from being handed in to the first token; from a token to
        the next; from being handed in to the end; from being handed in to a place in the batch.
    prompts, answers: tokens of those that have ended.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.begun_tokens = self.cached_tokens = 0
        self.ended = dict.fromkeys(ENDINGS, 0)
        self.first_token_s, self.between_tokens_s = Distribution(_SECONDS), Distribution(_SECONDS)
        self.whole_s, self.queue_s = Distribution(_SECONDS), Distribution(_SECONDS)
        self.prompts, self.answers = Distribution(_TOKENS), Distribution(_TOKENS)
        # Those that have not ended, with the time of their newest token.
        self._going: dict[Completion, float | None] = {}

    def add(self, completion: Completion) -> None:
        """One is to be run."""
        self._going[completion] = None

    def begin(self, completion: Completion) -> None:
        """It has a place in the batch."""
        self.begun_tokens += len(completion.prompt_token_ids)
        self.cached_tokens += completion.num_cached_tokens
        if completion.scheduled_s is not None:
            self.queue_s.observe(completion.scheduled_s - completion.begun_s)

    def look(self, completion: Completion) -> None:
        """Takes its newest token, where there is another than at the last look."""
        newest_s, before_s = completion.last_token_s, self._going[completion]
        if newest_s is None or newest_s == before_s:
            return
        self._going[completion] = newest_s
        self.generation_tokens += 1
        if before_s is None:
            self.prompt_tokens += len(completion.prompt_token_ids)
            self.first_token_s.observe(newest_s - completion.begun_s)
        else:
            self.between_tokens_s.observe(newest_s - before_s)

    def end(self, completion: Completion) -> None:
        """It has ended; once told, telling it again does nothing."""
        if completion not in self._going:
            return
        del self._going[completion]
        self.ended[completion.finish_reason or "error"] += 1
        self.prompts.observe(len(completion.prompt_token_ids))
        self.answers.observe(len(completion.token_ids))
        self.whole_s.observe((completion.ended_s or completion.begun_s) - completion.begun_s)
