"""How often the likeliest words of one column are those of the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# From there on an answer that has parted goes its own way.
FIRST_IDS = 16


@dataclass(frozen=True)
class Agreement:
    """Of the first 16 ids of each answer, or all where it is shorter.

    Attributes:
        whole: answers of which all of these are the truth's.
        ids: how many from the beginning on are the truth's, of an answer, in the mean.
        of: how many the truth has, in the mean.
    """

    answers: int
    whole: int
    ids: float
    of: float


def agreement(answers: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> Agreement:
    """Of answers to the same questions, one at least."""
    whole = ids = of = 0
    for answer, true_answer in zip(answers, truth, strict=True):
        ours, theirs = list(answer[:FIRST_IDS]), list(true_answer[:FIRST_IDS])
        whole += ours == theirs
        ids += next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
                    min(len(ours), len(theirs)))  # fmt: skip
        of += len(theirs)
    return Agreement(len(truth), whole, ids / len(truth), of / len(truth))
