"""What the check of a product lets through: the honest one alone.

Each kind of lie is told once or a few times; `test_tampering.py` counts.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from checked_linear import FIELD, CheckedLinear, assert_same_bits, centred, honest, products
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp_shm import _native


def one_more(linear: CheckedLinear) -> None:
    linear.y[1, 3] = (int(linear.y[1, 3]) + 1) % FIELD


def one_more_and_one_less(linear: CheckedLinear) -> None:
    one_more(linear)
    linear.y[1, 4] = (int(linear.y[1, 4]) - 1) % FIELD


def prime_more(linear: CheckedLinear) -> None:
    linear.y[1, 3] += FIELD


def the_prime_for_zero(linear: CheckedLinear) -> None:
    linear.y[2] = FIELD


def two_prime_for_zero(linear: CheckedLinear) -> None:
    linear.y[2] = 2 * FIELD


def all_ones(linear: CheckedLinear) -> None:
    linear.y[1, 3] = 2**32 - 1


def negative_looking(linear: CheckedLinear) -> None:
    """The same integers in two's complement."""
    linear.y[:] = centred(linear.y).astype(np.int32).view(np.uint32)


def swapped_rows(linear: CheckedLinear) -> None:
    linear.y[[0, 1]] = linear.y[[1, 0]]


def swapped_columns(linear: CheckedLinear) -> None:
    linear.y[:, [0, -1]] = linear.y[:, [-1, 0]]


def a_shifted_row(linear: CheckedLinear) -> None:
    linear.y[0] = np.roll(linear.y[0], 1)


def stale(linear: CheckedLinear) -> None:
    linear.y[:] = products(centred(linear.m)[::-1] + 1, linear.quantised)


def another_layers(linear: CheckedLinear) -> None:
    linear.y[:] = products(centred(linear.m), np.random.default_rng(9).permutation(linear.quantised))


def one_changed_weight(linear: CheckedLinear) -> None:
    linear.quantised[5, 6] += 1
    linear.answer()


def m_and_y_together(linear: CheckedLinear) -> None:
    linear.m[1, 2] = (int(linear.m[1, 2]) + 1) % FIELD
    linear.answer()


def a_multiple(linear: CheckedLinear) -> None:
    linear.y[0] = 2 * linear.y[0].astype(np.int64) % FIELD


def zeros(linear: CheckedLinear) -> None:
    linear.y[0] = 0


LIES = [
    one_more, one_more_and_one_less, prime_more, the_prime_for_zero, two_prime_for_zero, all_ones, negative_looking,
    swapped_rows, swapped_columns, a_shifted_row, stale, another_layers, one_changed_weight, m_and_y_together,
    a_multiple, zeros,
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lie_fails(isa, lie):
    linear = honest(70, 64, 5)
    linear.finish()
    linear.x[2] = 0
    linear.begin()
    linear.answer()
    truth = linear.y.copy()
    lie(linear)
    assert not linear.finish()
    linear.begin()
    linear.y[:] = truth
    assert linear.finish(), "what was false before is forgotten"


@pytest.mark.parametrize("outputs", [1025, 30_003])
def test_a_lie_fails_in_any_row_and_word(threads, outputs):
    linear = honest(outputs, 16, 5)
    for row in (0, 3, 4):
        for word in (0, 511, 512, outputs // 2, outputs - 1):
            linear.y[row, word] ^= 1 << 20
            assert not linear.finish()
            linear.y[row, word] ^= 1 << 20
            linear.begin()
    assert linear.finish()


def test_one_row_that_is_false_fails_a_block():
    linear = honest(33, 16, 64)
    for row in range(64):
        linear.y[row, row % 33] ^= 4
        assert not linear.finish()
        linear.y[row, row % 33] ^= 4
        linear.begin()


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_change_of_words_fails(data):
    linear = honest(66, 8, 3, seed=data.draw(st.integers(0, 9)))
    places = st.tuples(st.integers(0, 2), st.integers(0, 65))
    changes = data.draw(st.dictionaries(places, st.integers(0, 2**32 - 1), min_size=1, max_size=8))
    before = linear.y.copy()
    for place, word in changes.items():
        linear.y[place] = word
    assert linear.finish() == bool((linear.y == before).all())


def test_out_is_made_of_the_words_that_were_checked(threads):
    """Somebody writes while they are read: what held is the honest result, and what was copied is what was used."""
    linear = honest(3001, 64, 16)
    right, expected = linear.y.copy(), linear.own_results()
    wrong = right.copy()
    wrong[:, ::97] = (wrong[:, ::97].astype(np.int64) + 1) % FIELD
    is_over = threading.Event()

    def scribble() -> None:
        while not is_over.is_set():
            linear.y[:] = wrong
            linear.y[:] = right

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        for round in range(200):
            copy = np.zeros_like(right) if round % 2 else None
            if linear.finish(copy=copy):
                assert_same_bits(linear.out, expected)
                assert copy is None or (copy == right).all()
            elif copy is not None:
                assert (copy != right).any()
                scale = linear.linear.scales / _native.quantise_rows(linear.x, linear.linear)[1][:, None]
                assert_same_bits(linear.out, centred(copy).astype(np.float32) * scale)
            linear.begin()
    finally:
        is_over.set()
        scribbler.join()
