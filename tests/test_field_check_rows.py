"""Rows of a check between their begin and their finish: each once, in any order, by any callers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checked_linear import CheckedLinear, assert_same_bits, honest


def test_blocks_are_finished_in_any_order():
    linear = honest(70, 16, 12)
    linear.finish()
    for first, rows in ((0, 4), (4, 1), (5, 7)):
        linear.begin(first, rows)
    linear.answer()
    linear.out[:] = 0
    for first, rows in ((4, 1), (5, 3), (0, 4), (8, 4)):
        assert linear.finish(first, rows)
    assert_same_bits(linear.out, linear.own_results())


def test_rows_keep_what_they_were_begun_with():
    """x and m of a row may change once it is begun; a row begun for one Linear is nothing to another's check."""
    linear = honest(70, 16, 4)
    linear.x[:], linear.m[:] = 5, 0
    assert linear.finish()


def test_a_row_is_begun_once_and_finished_once():
    linear = honest(10, 8, 4)
    with pytest.raises(ValueError, match="row 0 of the check was begun and is not finished"):
        linear.begin()
    assert linear.finish(1, 2)
    with pytest.raises(ValueError, match="row 1 of the check was not begun"):
        linear.finish()
    with pytest.raises(ValueError, match="row 3 of the check was begun and is not finished"):
        linear.begin(1, 3)
    assert linear.finish(0, 1), "a call that was refused changes nothing"
    assert linear.finish(3, 1)
    linear.begin(2, 0)
    assert linear.finish(2, 0), "no rows hold"
    fresh = CheckedLinear(np.ones((2, 2), np.float32), 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="row 1 of the check was not begun"):
        fresh.finish(1, 1)


def test_a_row_that_failed_is_finished():
    linear = honest(10, 8, 2)
    linear.y[0, 0] ^= 1
    assert not linear.finish()
    linear.begin()
    linear.answer()
    assert linear.finish()


def test_callers_at_once_work_on_rows_of_their_own():
    linear = honest(300, 64, 32)
    linear.finish()
    expected, failures = linear.own_results(), []

    def work(first: int) -> None:
        try:
            for _ in range(200):
                linear.begin(first, 8)
                if not linear.finish(first, 8):
                    failures.append(first)
        except ValueError as error:
            failures.append(error)

    callers = [threading.Thread(target=work, args=(first,)) for first in range(0, 32, 8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures
    assert_same_bits(linear.out, expected)


def test_callers_at_once_share_no_row():
    linear = honest(300, 64, 8)
    together = threading.Barrier(2)

    def begins(_: int) -> bool:
        together.wait()
        try:
            linear.begin()
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(2) as callers:
        for _ in range(100):
            assert linear.finish()
            assert sorted(callers.map(begins, range(2))) == [False, True]
