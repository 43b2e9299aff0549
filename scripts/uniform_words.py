"""Whether words are drawn uniformly from the field: the tests of Pearson and of Kolmogorov and Smirnov, in numpy alone.

Of words that are uniform and independent, each test gives a number below alpha with probability alpha or less:
Pearson's up to the approximation by chi-square, the other one exactly so.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FIELD = 2**31 - 1
PARTS = 256
# With fewer on average, Pearson's statistic is not yet distributed as chi-square.
WORDS_A_PART = 20

Words = npt.NDArray[np.generic]


def chi_square_tail(statistic: float, degrees: int) -> float:
    """The probability that a chi-square variable is as large.

    Source: Q(a, x) of a = degrees / 2, x = statistic / 2, by Q(a + 1, x) = Q(a, x) + x^a e^-x / Gamma(a + 1) from
        Q(1, x) = e^-x or Q(1/2, x) = erfc(sqrt(x)) (DLMF 8.8.6, 8.4.6).
    """
    x = statistic / 2
    if x == 0:
        return 1.0
    first = 1.0 if degrees % 2 == 0 else 0.5
    tail = math.exp(-x) if first == 1 else math.erfc(math.sqrt(x))
    terms = (first + step for step in range((degrees - 1) // 2))
    return min(1.0, tail + math.fsum(math.exp(a * math.log(x) - x - math.lgamma(a + 1)) for a in terms))


def pearson(counts: Words, expected: npt.NDArray[np.float64]) -> float:
    """The p-value of counts against those that are expected."""
    return chi_square_tail(float(np.sum((counts - expected) ** 2 / expected)), len(expected) - 1)


def by_size(words: Words) -> float:
    """The p-value of `PARTS` intervals of the field, as long as each other but for one word: the upper bits."""
    ends = np.array([-(-part * FIELD // PARTS) for part in range(PARTS + 1)])
    counts = np.bincount(words.ravel() * PARTS // FIELD, minlength=PARTS)
    return pearson(counts, np.diff(ends) / FIELD * words.size)


def by_last_byte(words: Words) -> float:
    """The p-value of the lower bits."""
    sizes = np.array([(FIELD - 1 - part) // PARTS + 1 for part in range(PARTS)])
    counts = np.bincount(words.ravel() % PARTS, minlength=PARTS)
    return pearson(counts, sizes / FIELD * words.size)


def kolmogorov_smirnov(words: Words) -> float:
    """A bound of the p-value of the largest distance between the words' distribution and the uniform one.

    Source: Massart 1990, P(sqrt(n) D > d) <= 2 exp(-2 d^2) for every n: what Kolmogorov's series begins with.
    """
    ordered = np.sort(words.ravel()).astype(np.float64)
    count = len(ordered)
    # What is uniform on 0 .. p - 1 has reached (w + 1) / p at a word w, and w / p before it.
    above = np.arange(1, count + 1) / count - (ordered + 1) / FIELD
    below = ordered / FIELD - np.arange(count) / count
    distance = max(float(above.max()), float(below.max()), 0.0)
    return min(1.0, 2 * math.exp(-2 * count * distance**2))


def p_values(words: Words) -> dict[str, float]:
    """Of each test that so many words can be given. Shapes: words, integers in [0, p), of any shape."""
    words = words.astype(np.int64)
    found = {"KS": kolmogorov_smirnov(words)}
    if words.size >= PARTS * WORDS_A_PART:
        found |= {"chi-square of size": by_size(words), "chi-square of last bytes": by_last_byte(words)}
    return found
