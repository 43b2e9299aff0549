"""The check of a Linear that another process multiplied: what it makes of honest products.

`test_field_check_lies.py` has what it makes of others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from checked_linear import FIELD, CheckedLinear, assert_same_bits, honest
from field_reference import FLOAT32_MAX, NAN

from tsqp_shm import _native


def adversarial(x: np.ndarray) -> None:
    """Zeros, a peak, denormals, the largest numbers, and what is no number, each in a row."""
    rows = len(x)
    changes: list[Callable[[np.ndarray], None]] = [
        lambda row: row.fill(0),
        lambda row: row.__setitem__(0, 1e4),
        lambda row: np.multiply(row, np.float32(1e-40), out=row),
        lambda row: np.copysign(FLOAT32_MAX, row, out=row),
        lambda row: row.__setitem__(-1, np.nan),
        lambda row: row.__setitem__(0, -np.inf),
        lambda row: row.fill(-1),
    ]
    for row, change in zip(range(1, rows, 2), changes, strict=False):
        change(x[row])


SHAPES = [(1, 2, 1), (3, 4, 2), (17, 64, 3), (63, 30, 4), (65, 66, 5), (576, 130, 9), (1025, 64, 6), (9001, 12, 3)]


@pytest.mark.parametrize(("outputs", "inputs", "rows"), SHAPES)
def test_results_are_those_of_the_linear_bit_for_bit(isa, threads, outputs, inputs, rows):
    random = np.random.default_rng(outputs)
    weight = random.normal(0, 0.02, (outputs, inputs)).astype(np.float32)
    bias = random.normal(0, 1, outputs).astype(np.float32) if outputs % 2 else None
    linear = CheckedLinear(weight, rows, random, bias)
    linear.x[:] = random.normal(0, 1, (rows, inputs))
    adversarial(linear.x)
    for _ in range(2):
        linear.begin()
        linear.answer()
        assert linear.finish()
        assert_same_bits(linear.out, linear.own_results())


@pytest.mark.parametrize("exponent", [-140, -80, 0, 80, 120])
def test_scales_of_any_size_give_the_bits_of_the_linear(isa, exponent):
    random = np.random.default_rng(3)
    weight = np.ldexp(random.normal(0, 1, (70, 64)), exponent).astype(np.float32)
    linear = CheckedLinear(weight, 15, random)
    for x_exponent in (-145, -60, -33, 0, 30, 63, 100):
        linear.x[:] = np.ldexp(random.normal(0, 1, (15, 64)), x_exponent - np.arange(15)[:, None]).astype(np.float32)
        linear.begin()
        linear.answer()
        assert linear.finish()
        assert_same_bits(linear.out, linear.own_results())


@pytest.mark.parametrize("bias", [np.nan, np.inf, FLOAT32_MAX])
def test_a_bias_that_is_no_number_gives_the_bits_of_the_linear(isa, bias):
    linear = honest(20, 8, 3, bias=np.full(20, bias, np.float32))
    assert linear.finish()
    assert_same_bits(linear.out, linear.own_results())


def test_m_is_the_quantised_row_in_the_field(isa, threads):
    linear = honest(5, 578, 9)
    adversarial(linear.x)
    linear.finish()
    copy = np.full((9, 578), 7, np.uint32)
    linear.begin(copy=copy)
    integers, _, _ = _native.quantise_rows(linear.x, linear.linear)
    np.testing.assert_array_equal(linear.m, integers.astype(np.int64) % FIELD)
    np.testing.assert_array_equal(copy, linear.m)


@pytest.mark.parametrize("outputs", [64, 65, 1026, 1027])
def test_a_copy_gets_the_words_of_y_as_they_were(isa, threads, outputs):
    linear = honest(outputs, 16, 5)
    lies = np.random.default_rng(1).integers(0, 2**32, (5, outputs), dtype=np.uint32)
    for y, holds in ((linear.y.copy(), True), (lies, False)):
        linear.y[:] = y
        copy = np.zeros_like(y)
        assert linear.finish(copy=copy) == holds
        np.testing.assert_array_equal(copy, y)
        linear.begin()


def test_a_row_that_is_no_number_is_checked_as_zeros():
    linear = honest(40, 16, 3)
    linear.finish()
    linear.x[1, 5] = np.nan
    linear.begin()
    assert not linear.m[1].any()
    linear.answer()
    assert linear.finish()
    assert_same_bits(linear.out[1], np.full(40, NAN))
    assert np.isfinite(linear.out[[0, 2]]).all()
    linear.begin()
    linear.y[1, 3] = 1
    assert not linear.finish()


@pytest.mark.parametrize("num_vectors", [1, 2, 3, 16])
def test_any_number_of_vectors_checks(isa, num_vectors):
    vectors = np.random.default_rng(2).integers(0, FIELD, (num_vectors, 130), dtype=np.uint32)
    linear = honest(130, 64, 5, vectors=vectors)
    assert linear.finish()
    linear.begin()
    linear.y[4, 129] ^= 1
    assert not linear.finish()


@pytest.mark.parametrize("word", [0, 1, FIELD // 2, FIELD // 2 + 1, FIELD - 1])
def test_vectors_of_extreme_words_hold_for_honest_products(isa, word):
    """Weights and integers of one sign: the largest sums that there are."""
    random = np.random.default_rng(0)
    outputs, inputs = 2000, 258
    linear = CheckedLinear(
        np.full((outputs, inputs), 127, np.float32), 5, random, vectors=np.full((2, outputs), word, np.uint32)
    )
    for sign in (-1, 1):
        linear.x[:] = sign
        linear.begin()
        linear.answer()
        assert linear.finish()
    linear.begin()
    linear.y[2, 7] += 1
    assert linear.finish() == (word == 0)


def test_a_check_outlives_its_linear():
    linear = honest(70, 16, 3)
    expected = linear.own_results()
    linear.linear.set_rows(0, np.zeros((70, 16), np.float32))
    linear.linear.set_bias(np.ones(70, np.float32))
    del linear.linear
    assert linear.finish()
    assert_same_bits(linear.out, expected)


def test_what_a_check_reads_can_be_asked_for():
    linear = honest(70, 16, 3)
    linear.check.fetch()
    assert linear.finish()


def test_the_memory_of_a_check_is_its_vectors():
    linear = honest(640, 576, 8)
    vectors = 4 * 2 * (640 + 576)
    assert vectors + 4 * 640 <= linear.check.num_bytes <= vectors + 4 * 640 + 8 * 16
