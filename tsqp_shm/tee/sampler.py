"""From logits to a token: penalties, temperature, top-k, top-p, and a seeded draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tsqp_shm.errors import ProtocolError
from tsqp_shm.tee.sampling_params import SamplingParams


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
