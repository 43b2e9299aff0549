"""From logits to a token: penalties, temperature, top-k, top-p, and a seeded draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tsqp_shm.errors import ConfigError, ProtocolError


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is sampled; names and meanings as in vLLM.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens; 0: all.
        top_p: sample among the likeliest tokens that together have this probability.
        repetition_penalty: above 1 makes tokens of prompt and completion less likely (Keskar et al. 2019).
        seed: makes the completion repeatable in the same company; None draws a new one. Beside other prompts the
            products have other shapes and round differently, which can tip a draw between near equals.
        stop: strings that end the completion; they are not part of it.
        ignore_eos: go on after an end-of-sequence token.
        deadline_s: ends the completion so many seconds after it was asked for, with what it has by then; looked at
            between two steps. None: it may take as long as it takes.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stops)
        for field, value, good, expected in (
            ("max_tokens", self.max_tokens, _is_int(self.max_tokens) and self.max_tokens >= 1, "1 or more"),
            (
                "temperature",
                self.temperature,
                _is_finite(self.temperature) and self.temperature >= 0,
                "0 or more",
            ),
            ("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, _is_finite(self.top_p) and 0 < self.top_p <= 1, "more than 0, at most 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                _is_finite(self.repetition_penalty) and self.repetition_penalty > 0,
                "more than 0",
            ),
            ("seed", self.seed, self.seed is None or (_is_int(self.seed) and self.seed >= 0), "0 or more"),
            (
                "deadline_s",
                self.deadline_s,
                self.deadline_s is None or (_is_finite(self.deadline_s) and self.deadline_s > 0),
                "seconds, more than 0",
            ),
            ("stop", self.stop, all(isinstance(text, str) and text for text in stops), "strings, not empty"),
        ):
            if not good:
                raise ConfigError(field, value, expected)


class Sampler:
    """Samples the tokens of one completion."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: npt.NDArray[np.float32], history: Sequence[int]) -> int:
        """Shapes: logits [V] f32; history: prompt and completion so far.

        Raises:
            ProtocolError: the logits hold a NaN or an infinity that leaves nothing to choose from.
        """
        params = self._params
        # UNTRUSTED: whatever these numbers are, the result must be an index below V.
        if not np.isfinite(logits).all():
            raise ProtocolError("logits", "finite numbers", "NaN or infinity; --check-finite says where they began")
        if params.repetition_penalty != 1.0:
            logits = _penalised(logits, history, params.repetition_penalty)
        if params.temperature == 0.0:
            return int(np.argmax(logits))
        # The likeliest becomes 0, so that a tiny temperature can overflow to -inf only: to a probability of 0.
        scores = logits.astype(np.float64)
        scores -= scores.max()
        with np.errstate(over="ignore"):
            scores /= params.temperature
        return self._draw(scores)

    def _draw(self, scores: npt.NDArray[np.float64]) -> int:
        # Likeliest first; equal scores in the order of their ids, so a seed repeats.
        order = np.argsort(-scores, kind="stable")
        if self._params.top_k:
            order = order[: self._params.top_k]
        probabilities = np.exp(scores[order] - scores[order[0]])
        probabilities /= probabilities.sum()
        cumulative = np.cumsum(probabilities)
        # A token stays if what is likelier than it has not reached top_p yet; the first always stays.
        kept = max(1, int(np.searchsorted(cumulative, self._params.top_p * (1 - 1e-12), side="left")) + 1)
        cumulative = cumulative[:kept]
        drawn = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(order[min(drawn, len(cumulative) - 1)])


def _penalised(logits: npt.NDArray[np.float32], history: Sequence[int], penalty: float) -> npt.NDArray[np.float32]:
    seen = np.unique(np.asarray(history, np.int64))
    scores = logits[seen].astype(np.float64)
    with np.errstate(over="ignore"):
        scores = np.where(scores > 0, scores / penalty, scores * penalty)
    # UNTRUSTED: a huge logit must not become an infinity here, behind the check for one.
    largest = np.finfo(np.float32).max
    logits = logits.copy()
    logits[seen] = np.clip(scores, -largest, largest)
    return logits


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))
