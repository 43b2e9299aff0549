"""Rows that pads blind: what crosses, what comes out of it, and what is refused. The stock: `test_pad_stock.py`."""

from __future__ import annotations

import gc
from itertools import pairwise

import numpy as np
import pytest
from checked_linear import FIELD, CheckedLinear, assert_same_bits
from field_reference import NAN
from known_pads import begin, known_pads, stocked, taken

from tsqp_shm import _native

SHAPES = [(1, 2, 1), (3, 4, 2), (17, 64, 3), (63, 30, 4), (65, 66, 5), (577, 130, 9), (1025, 64, 6), (9001, 12, 3)]


def random_linear(outputs: int, inputs: int, rows: int, seed: int = 0) -> CheckedLinear:
    random = np.random.default_rng([seed, outputs, inputs])
    bias = random.normal(0, 1, outputs).astype(np.float32) if outputs % 2 else None
    linear = CheckedLinear(random.normal(0, 0.02, (outputs, inputs)).astype(np.float32), rows, random, bias)
    linear.x[:] = random.normal(0, 1, (rows, inputs))
    # Zeros, a peak, what is no number: each in a row, where there are so many.
    linear.x[1:2], linear.x[2:3, 0], linear.x[3:4, -1], linear.x[4:5, 0] = 0, 1e4, np.nan, -np.inf
    return linear


@pytest.mark.parametrize(("outputs", "inputs", "rows"), SHAPES)
def test_m_is_the_quantised_row_less_its_pad(isa, threads, outputs, inputs, rows):
    linear = random_linear(outputs, inputs, rows)
    copy = np.full((rows, inputs), 7, np.uint32)
    with stocked([linear], rows + 2) as stock:
        taken(stock, 0, 1)
        begin(linear, taken(stock, 0, rows), copy=copy)
    integers, _, _ = _native.quantise_rows(linear.x, linear.linear)
    pads = known_pads(0, 1, rows, inputs).astype(np.int64)
    np.testing.assert_array_equal(linear.m, (integers.astype(np.int64) - pads) % FIELD)
    np.testing.assert_array_equal(copy, linear.m)


@pytest.mark.parametrize(("outputs", "inputs", "rows"), SHAPES)
def test_results_are_those_without_pads_bit_for_bit(isa, threads, outputs, inputs, rows):
    linear = random_linear(outputs, inputs, rows)
    with stocked([linear], 2 * rows) as stock:
        for _ in range(3):
            begin(linear, taken(stock, 0, rows))
            linear.answer()
            copy = np.zeros_like(linear.y)
            assert linear.finish(copy=copy)
            np.testing.assert_array_equal(copy, linear.y)
            assert_same_bits(linear.out, linear.own_results())
        assert (stock.used, stock.burned) == (3 * rows, 0)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_any_size_are_finished_in_any_order_round_after_round_of_the_ring(threads, seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(24, 60))
    linears = [random_linear(outputs, 30, 24, seed) for outputs in (70, 131)]
    with stocked(linears, capacity, threads=2) as stock:
        for _ in range(12):
            for index, linear in enumerate(linears):
                for first, rows in blocks(random, 24):
                    begin(linear, taken(stock, index, rows), first)
                linear.answer()
                linear.out[:] = 0
                # Other blocks than those that were begun.
                for first, rows in random.permutation(blocks(random, 24)):
                    assert linear.finish(int(first), int(rows))
                assert_same_bits(linear.out, linear.own_results())
        assert (stock.used, stock.burned) == (2 * 12 * 24, 0)


def blocks(random: np.random.Generator, rows: int) -> list[tuple[int, int]]:
    """First row and number of rows, which together are all."""
    cuts = [0, *sorted({int(cut) for cut in random.integers(1, rows, 4)}), rows]
    return [(first, end - first) for first, end in pairwise(cuts)]


def test_rows_with_pads_and_rows_without_are_finished_together(isa):
    linear = random_linear(131, 30, 6)
    with stocked([linear], 6) as stock:
        begin(linear, taken(stock, 0, 2), 2)
        linear.begin(0, 2)
        linear.begin(4, 2)
        linear.answer()
        assert linear.finish()
        assert stock.used == 2
    assert_same_bits(linear.out, linear.own_results())


def test_a_row_that_is_no_number_is_zeros_less_its_pad():
    linear = random_linear(41, 16, 4)
    linear.x[:] = np.nan
    with stocked([linear], 4) as stock:
        begin(linear, taken(stock, 0, 4))
        np.testing.assert_array_equal(linear.m, (FIELD - known_pads(0, 0, 4, 16).astype(np.int64)) % FIELD)
        linear.answer()
        assert linear.finish()
    assert_same_bits(linear.out, np.full((4, 41), NAN))


def test_a_false_product_is_found_under_a_pad(isa, threads):
    linear = random_linear(1030, 64, 5)
    with stocked([linear], 64) as stock:
        begin(linear, taken(stock, 0, 5))
        for row, column, change in ((0, 0, 1), (2, 513, FIELD - 1), (4, 1029, 1), (1, 3, FIELD), (3, 7, 2**31)):
            linear.answer()
            honest = int(linear.y[row, column])
            false = honest + change if change >= FIELD else (honest + change) % FIELD
            linear.y[row, column] = min(false, 2**32 - 1)
            assert not linear.finish()
            begin(linear, taken(stock, 0, 5))
        linear.y[:] = FIELD - 1
        assert not linear.finish()
        begin(linear, taken(stock, 0, 5))
        linear.answer()
        linear.y[[0, 2]] = linear.y[[2, 0]]
        assert not linear.finish()
        assert (stock.used, stock.burned) == (7 * 5, 0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_products_come_out_from_under_a_pad(isa, sign):
    """Weights and integers of one sign, whose sums come next to the bound: no pad wraps them."""
    linear = CheckedLinear(np.full((70, 258), 127, np.float32), 5, np.random.default_rng(0))
    linear.x[:] = sign
    with stocked([linear], 5) as stock:
        begin(linear, taken(stock, 0, 5))
        linear.answer()
        assert linear.finish()
    assert_same_bits(linear.out, linear.own_results())
    assert (np.sign(linear.out) == sign).all()


def test_rows_of_pads_blind_once():
    """Two rows under one pad show the difference of both."""
    linear = random_linear(20, 8, 4)
    with stocked([linear], 4) as stock:
        pads = taken(stock, 0, 2)
        begin(linear, pads)
        linear.answer()
        assert linear.finish(0, 2)
        m = linear.m.copy()
        for first in (0, 2):
            with pytest.raises(ValueError, match=r"pads: rows \[0, \+2\) of Linear 0 have blinded something"):
                begin(linear, pads, first)
        np.testing.assert_array_equal(linear.m, m)
        linear.begin(0, 4)


def test_pads_must_fit():
    linears = [random_linear(20, 8, 4, seed) for seed in (0, 1)]
    with stocked(linears, 8) as stock:
        pads = taken(stock, 1, 2)
        with pytest.raises(ValueError, match="pads: got those of 2 rows, expected 3"):
            linears[1].check.begin(linears[1].slots, 2, 0, 0, 3, None, pads)
        with pytest.raises(ValueError, match="pads: of Linear 1 of their stock, whose weights are not this check's"):
            begin(linears[0], pads)
        begin(linears[1], taken(stock, 1, 2))
        with pytest.raises(ValueError, match="was begun and is not finished"):
            begin(linears[1], pads)
        begin(linears[1], pads, 2), "a call that was refused has blinded nothing"
        linears[1].answer()
        assert linears[1].finish()
        assert_same_bits(linears[1].out, linears[1].own_results())


def test_a_check_of_the_same_weights_loaded_again_takes_the_stock_s_pads():
    linear = random_linear(21, 8, 4)
    again = _native.FieldLinear(21, 8)
    again.set_rows(0, np.random.default_rng([0, 21, 8]).normal(0, 0.02, (21, 8)).astype(np.float32))
    with stocked([linear], 4) as stock:
        linear.check = _native.FieldCheck(linear.linear, np.ones((2, 21), np.uint32))
        begin(linear, taken(stock, 0, 4))
        linear.answer()
        assert linear.finish()


def test_what_a_check_began_and_nobody_finishes_is_burned_with_it():
    linear = random_linear(20, 8, 4)
    with stocked([linear], 4) as stock:
        begin(linear, taken(stock, 0, 2))
        begin(linear, taken(stock, 0, 2), 2)
        linear.answer()
        assert linear.finish(0, 1)
        assert (stock.used, stock.burned) == (1, 0)
        del linear.check
        gc.collect()
        assert (stock.used, stock.burned) == (1, 3)
        assert stock.wait(0, 4, 30)


def test_begun_rows_outlive_the_stock():
    linear = random_linear(20, 8, 4)
    with stocked([linear], 4) as stock:
        begin(linear, taken(stock, 0, 4))
        linear.answer()
    del stock
    gc.collect()
    assert linear.finish()
    assert_same_bits(linear.out, linear.own_results())
