"""How far the logits of one column are from the model's own in float32, and how well they predict a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
# Of a vocabulary in float64, so that a whole text's never lie there.
_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Scores:
    """Over the predictions of a text, each token's but the first.

    Attributes:
        top1: share of rows whose likeliest token is the truth's.
        largest: the largest difference of a logit, in deviations of the truth's logits.
        kl: mean Kullback-Leibler divergence of the truth's distribution from this one, in nats.
    """

    predictions: int
    perplexity: float
    top1: float
    largest: float
    kl: float


def scores_of(logits: Float32, truth: Float32, token_ids: list[int]) -> Scores:
    """Shapes: logits, truth [T, V] f32, the rows of the T token ids. Numerics: float64."""
    rows = len(token_ids) - 1
    following = np.asarray(token_ids[1:])
    surprise = agreed = divergence = largest = 0.0
    total = squares = 0.0
    for first in range(0, rows, _ROWS_AT_ONCE):
        block = slice(first, min(first + _ROWS_AT_ONCE, rows))
        ours, theirs = logits[block].astype(np.float64), truth[block].astype(np.float64)
        largest = max(largest, float(np.abs(ours - theirs).max()))
        total, squares = total + float(theirs.sum()), squares + float((theirs**2).sum())
        agreed += float((ours.argmax(1) == theirs.argmax(1)).sum())
        log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
        divergence += float((np.exp(log_theirs) * (log_theirs - log_ours)).sum())
        surprise -= float(log_ours[np.arange(len(ours)), following[block]].sum())
    mean = total / (rows * truth.shape[1])
    deviation = math.sqrt(squares / (rows * truth.shape[1]) - mean**2)
    return Scores(rows, math.exp(surprise / rows), agreed / rows, largest / deviation, divergence / rows)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result
