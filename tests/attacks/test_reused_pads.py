"""A pad that is used twice: what two rows differ by crosses in clear, and gives both.

The scheme is the right one, used wrongly: m_1 = x_1 - r and m_2 = x_2 - r mod p under one r, as when a seed is kept in
a file and the process goes back to an older state, when a fork goes on with its parent's counter, or where pads are
taken from a small set that was made before. Each row by itself is uniform. But

    m_1 - m_2 = x_1 - x_2 mod p

and activations are small, so the difference of such rows is small in all words, where that of others is uniform: which
two rows share a pad is seen at once (2^17 of 2^31 for each word). Of the first Linear's rows the difference is one of
two tokens, with the two rows' secret scales (`test_prompt_from_activations`):

    d = s_1 |x_1| u_t - s_2 |x_2| u_t',    in the plane of u_t and u_t', and of no other pair's

The length of d's projection on each of V^2 planes, by a formula of <d, u_t>, <d, u_t'> and <u_t, u_t'>, names t and t',
and the signs which is whose. The mode draws its seed anew in every process and counts rows up; here it is made to draw
one seed twice, which shows that the attack is alive against what really crosses.

Source: the two-time pad of every textbook; what it does to pads that are made before from a small secret set, in
    systems that shield models, is in Saini et al., arXiv 2602.11088.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import pytest
from crossing import CHANCE, FIELD, PARAMS, PROMPT, Rows, conversation, in_place, model, table, watched
from read_arena import centred

from tsqp_shm import _native

# What two rows of activations differ by at most: of three digits, as a row with a peak among small numbers has.
LARGEST = 2 * 8_355_711
OTHER_PROMPT = PROMPT[::-1]
# As many rows as tokens are looked for of.
BEGINNING = PROMPT[:64]

Words = npt.NDArray[np.uint32]


def tokens_of(difference: Rows) -> tuple[int, int]:
    """Of the row that was taken from, and of the one that was taken away. Shapes: [C]."""
    units = table().directions.astype(np.float64)
    between = units @ units.T
    np.fill_diagonal(between, 0)
    d = difference / np.linalg.norm(difference)
    of_first, of_second = (units @ d)[:, None], (units @ d)[None, :]
    # d = f u_t + g u_t' + what is orthogonal to both.
    f = (of_first - between * of_second) / (1 - between**2)
    g = (of_second - between * of_first) / (1 - between**2)
    lengths = np.where((f > 0) & (g < 0), f * of_first + g * of_second, -np.inf)
    np.fill_diagonal(lengths, -np.inf)
    t, u = np.unravel_index(lengths.argmax(), lengths.shape)
    return int(t), int(u)


def attack(differences: Rows) -> tuple[list[int], list[int]]:
    """The tokens of the first rows and of the second ones. Shapes: [T, C]."""
    first, second = zip(*map(tokens_of, differences), strict=True)
    return list(first), list(second)


def are_small(words: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which rows of differences are those of activations. Shapes: [T, C] -> [T]."""
    apart = words % FIELD
    small: npt.NDArray[np.bool_] = ((apart <= LARGEST) | (apart >= FIELD - LARGEST)).all(axis=1)
    return small


def under_one_pad(first: Words, second: Words) -> list[tuple[int, int]]:
    """Which rows differ by so little that they share a pad. Shapes: [T, C] each."""
    found = []
    for index, row in enumerate(first.astype(np.int64)):
        # A few words rule out nearly all.
        others = np.flatnonzero(are_small(row[:4] - second[:, :4]))
        found += [(index, int(other)) for other in others[are_small(row - second[others])]]
    return found


@pytest.mark.parametrize("mode", ["plain", "verified"])
def test_what_two_rows_in_clear_differ_by_gives_both(mode):
    rows = conversation(mode).rows()[: len(BEGINNING)]
    first, second = attack(rows - np.roll(rows, 1, axis=0))
    assert in_place(first, BEGINNING) == len(BEGINNING)
    assert in_place(second, np.roll(BEGINNING, 1)) == len(BEGINNING)


def test_two_rows_under_one_pad_give_both():
    """In plain numpy, on the integers that `verified` lets cross: the rows of a prompt, two by two under one pad."""
    words = conversation("verified").inputs[0][: len(BEGINNING)].astype(np.int64)
    half = len(words) // 2
    r = np.random.default_rng(3).integers(0, FIELD, words[:half].shape)
    first, second = (words[:half] - r) % FIELD, (words[half:] - r) % FIELD
    pairs = under_one_pad(first, second)
    assert pairs == [(row, row) for row in range(half)]
    found = attack(centred((first - second) % FIELD))
    assert in_place([*found[0], *found[1]], BEGINNING) == len(BEGINNING)


def test_the_mode_itself_gives_both_where_it_is_made_to_draw_one_seed_twice(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(_native, "PadKeys", functools.partial(_native.PadKeys, seed=bytes(range(32))))
        first, second = (watched(model(), "blinded", [prompt], PARAMS).inputs[0] for prompt in (PROMPT, OTHER_PROMPT))
    assert under_one_pad(first, second) == [(row, row) for row in range(len(first))]
    length = len(BEGINNING)
    found = attack(centred((first[:length].astype(np.int64) - second[:length]) % FIELD))
    assert in_place(found[0], BEGINNING) == length
    assert in_place(found[1], OTHER_PROMPT[:length]) == length


def test_in_blinded_no_two_rows_share_a_pad_and_chance_is_left():
    """Of one session and of two, of each Linear."""
    seen, other = conversation("blinded"), watched(model(), "blinded", [OTHER_PROMPT], PARAMS)
    for linear, rows in seen.inputs.items():
        assert under_one_pad(rows, rows) == [(row, row) for row in range(len(rows))]
        assert under_one_pad(rows, other.inputs[linear]) == []
    rows = seen.inputs[0][: len(BEGINNING)].astype(np.int64)
    first, second = attack(centred((rows - np.roll(rows, 1, axis=0)) % FIELD))
    assert in_place(first, BEGINNING) < CHANCE
    assert in_place(second, np.roll(BEGINNING, 1)) < CHANCE
