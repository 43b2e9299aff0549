"""What crosses in `blinded` are uniform words, whatever was multiplied; and the tests that say so can fail.

Three tests of words (`scripts/uniform_words.py`), each of the words themselves, of what rows differ by, and of what
neighbours in a row differ by: a pad that is not uniform shows in the first, one that is used twice, or whose words hang
together, in the others. Of independent uniform words all three are uniform. Pads are random, so a true claim fails once
in a million each time that a test is asked.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from checked_linear import CheckedLinear, M, X
from crossing import FIELD, conversation
from uniform_words import chi_square_tail, kolmogorov_smirnov, p_values

from tsqp_shm import _native

ALPHA = 1e-6
ROWS, INPUTS, OUTPUTS = 1000, 96, 16
LONG_RUNS = 100

Words = npt.NDArray[np.uint32]


def differences(words: npt.NDArray[np.int64], axis: int) -> npt.NDArray[np.int64]:
    return np.diff(words, axis=axis) % FIELD


def smallest(*rows: npt.NDArray[np.generic]) -> float:
    """The p-value of all tests of all rows together: the smallest, times how many there are. Shapes: [T, K] each."""
    found: list[tuple[float, str]] = []
    for words in (each.astype(np.int64) for each in rows):
        of = {"words": words, "rows": differences(words, 0), "neighbours": differences(words, 1)}
        found += [(p, f"{test} of {name}") for name, view in of.items() for test, p in p_values(view).items()]
    p, test = min(found)
    print(f"{sum(each.size for each in rows):,} words, smallest of {len(found)} p-values: {p:.2g} ({test})")
    return min(1.0, p * len(found))


def rows_of(kind: str, random: np.random.Generator) -> npt.NDArray[np.float32]:
    x = np.zeros((ROWS, INPUTS), np.float32)
    if kind == "constant":
        x[:] = 0.7
    elif kind == "one-hot":
        x[np.arange(ROWS), random.integers(0, INPUTS, ROWS)] = 1
    elif kind == "normal":
        x[:] = random.standard_normal(x.shape)
    return x


def words_of(x: npt.NDArray[np.float32], *, is_blinded: bool) -> Words:
    """What of such rows would be written into the arena."""
    random = np.random.default_rng(1)
    linear = CheckedLinear(random.normal(0, 0.02, (OUTPUTS, INPUTS)).astype(np.float32), len(x), random)
    linear.x[:] = x
    if not is_blinded:
        linear.begin()
        return linear.m.copy()
    keys = _native.PadKeys(b"words", b"digest", 0, 1)
    stock = _native.PadStock(keys, [linear.linear], len(x), 2)
    assert stock.wait(0, len(x), 30.0)
    linear.check.begin(linear.slots, X, M, 0, len(x), None, stock.take(0, len(x)))
    words = linear.m.copy()
    stock.close()
    return words


KINDS = ("zeros", "constant", "one-hot", "normal")


@pytest.mark.parametrize("runs", [1, pytest.param(LONG_RUNS, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_words_of_any_rows_are_uniform_in_blinded(kind, runs):
    random = np.random.default_rng(2)
    words = [words_of(rows_of(kind, random), is_blinded=True) for _ in range(runs)]
    assert smallest(np.concatenate(words)) > ALPHA


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_the_same_rows_are_not_in_verified(kind):
    assert smallest(words_of(rows_of(kind, np.random.default_rng(2)), is_blinded=False)) < ALPHA


def test_words_of_a_conversation_are_uniform_in_blinded():
    """Of each Linear, prompt and answer: the rows of one are of one width."""
    assert smallest(*conversation("blinded").inputs.values()) > ALPHA


def test_words_of_the_same_conversation_are_not_in_verified():
    for words in conversation("verified").inputs.values():
        assert smallest(words) < ALPHA


def uniform(random: np.random.Generator) -> npt.NDArray[np.int64]:
    return random.integers(0, FIELD, (ROWS, INPUTS))


# Pads that look random, and what is wrong with them.
WEAK = {
    "half of the field": lambda random: random.integers(0, FIELD // 2, (ROWS, INPUTS)),
    "even words": lambda random: uniform(random) // 2 * 2,
    "of 2^16 values": lambda random: uniform(random) >> 15 << 15,
    "one row for two": lambda random: np.repeat(uniform(random)[: ROWS // 2], 2, axis=0),
    "one word for two": lambda random: np.repeat(uniform(random)[:, : INPUTS // 2], 2, axis=1),
    "rows that count up": lambda random: (uniform(random)[:1] + 1000 * np.arange(ROWS)[:, None]) % FIELD,
    "wider than one part in fifty": lambda random: uniform(random) // 50 * 51 % FIELD,
}


def test_words_that_are_uniform_pass():
    assert smallest(uniform(np.random.default_rng(3))) > ALPHA


@pytest.mark.parametrize("weak", WEAK)
def test_pads_that_only_look_random_fail(weak):
    """On rows of zeros, of which m is the pad's negative."""
    assert smallest(-WEAK[weak](np.random.default_rng(4)) % FIELD) < ALPHA


# Of tables: the value that a chi-square variable exceeds with this probability.
QUANTILES = [
    (1, 0.05, 3.8415), (1, 0.001, 10.828), (2, 0.05, 5.9915), (5, 0.01, 15.086), (10, 0.05, 18.307), (29, 0.99, 14.256),
    (30, 0.995, 13.787), (99, 0.05, 123.225), (100, 0.95, 77.929), (100, 0.001, 149.449),
]  # fmt: skip


@pytest.mark.parametrize(("degrees", "probability", "quantile"), QUANTILES)
def test_the_tail_of_chi_square_has_the_quantiles_of_tables(degrees, probability, quantile):
    assert chi_square_tail(quantile, degrees) == pytest.approx(probability, rel=1e-3)


def test_the_tail_of_chi_square_has_no_limit_below():
    assert 0 < chi_square_tail(1000, 255) < 1e-80
    assert chi_square_tail(1e7, 255) == 0
    assert chi_square_tail(0, 255) == 1


@pytest.mark.parametrize(("probability", "quantile"), [(0.05, 1.3581), (0.01, 1.6276), (0.001, 1.9495)])
def test_the_bound_of_kolmogorov_and_smirnov_has_their_quantiles(probability, quantile):
    """Words in even distances, moved by as much of the field as the quantile says."""
    count = 10_000
    words = (np.arange(count) + 0.5) / count * (1 - quantile / np.sqrt(count)) * FIELD
    assert kolmogorov_smirnov(words.astype(np.int64)) == pytest.approx(probability, rel=0.05)
