"""Pads that are made ahead: counted, handed out once each, and made by threads that nobody waits for.

What is in the rows shows where results are made with them: `test_field_check_pads.py`.
"""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from checked_linear import CheckedLinear, honest
from known_pads import SOON_S, begin, pad_keys, stocked, taken

from tsqp_shm import _native


def small(outputs: int = 3, inputs: int = 4, seed: int = 0) -> CheckedLinear:
    random = np.random.default_rng([seed, outputs])
    return CheckedLinear(random.normal(0, 1, (outputs, inputs)).astype(np.float32), 4, random)


@pytest.mark.parametrize("capacity", [1, 2, 3, 50, 95, 96, 97, 193, 300])
def test_a_stock_fills_to_its_capacity(capacity):
    with stocked([small(), small(65), small(1)], capacity) as stock:
        assert all(stock.wait(linear, capacity, SOON_S) for linear in range(3))
        assert (stock.available, stock.capacity, stock.made) == (capacity, capacity, 3 * capacity)
        assert stock.take(1, capacity + 1) is None
        pads = stock.take(1, capacity)
        assert (pads.linear, pads.first_row, pads.rows) == (1, 0, capacity)
        assert [stock.available_of(linear) for linear in range(3)] == [capacity, 0, capacity]
        assert stock.available == 0
        assert stock.take(1, 1) is None
        del pads
        assert stock.wait(1, capacity, SOON_S)
        assert stock.take(1, 1).first_row == capacity


def test_rows_are_free_in_order_whatever_order_they_are_given_back_in():
    with stocked([small()], 4) as stock:
        first, second, third = taken(stock, 0, 1), taken(stock, 0, 2), taken(stock, 0, 1)
        del second, third
        assert not stock.wait(0, 1, 0.05)
        assert stock.burned == 3
        del first
        assert stock.wait(0, 4, SOON_S)
        assert stock.take(0, 1).first_row == 4


def test_who_waits_gets_rows_as_soon_as_there_are_slots():
    """Fewer than a batch, which would be made later otherwise."""
    with stocked([small()], 100) as stock:
        held = [taken(stock, 0, 1) for _ in range(100)]
        for row in range(3):
            held.pop(0)
            assert stock.wait(0, 1, SOON_S)
            held.append(stock.take(0, 1))
            assert held[-1].first_row == 100 + row
            assert not stock.wait(0, 1, 0)


def test_waiting_ends_with_its_time_and_at_once_for_what_cannot_come():
    with stocked([small()], 4, threads=0) as stock:
        assert not stock.wait(0, 1, 0.01)
        assert not stock.wait(0, 5, 1e9)
        assert stock.wait(0, 0, 0)
        assert stock.take(0, 1) is None
        assert stock.made == 0
        closing = threading.Timer(0.05, stock.close)
        closing.start()
        assert not stock.wait(0, 1, SOON_S)
        closing.join()


def test_makers_that_are_to_rest_work_for_who_waits():
    with stocked([small()], 4) as stock:
        stock.rest(True)
        for row in range(0, 12, 4):
            assert taken(stock, 0, 4).first_row == row
        stock.rest(False)
        assert stock.wait(0, 4, SOON_S)
        stock.rest(True)


def test_what_was_used_and_what_was_burned_is_counted():
    linear = honest(40, 16, 4)
    linear.finish()
    with stocked([linear], 8) as stock:
        begin(linear, taken(stock, 0, 4))
        assert (stock.used, stock.burned) == (0, 0)
        linear.answer()
        assert linear.finish()
        assert (stock.used, stock.burned) == (4, 0)
        del linear.check
        taken(stock, 0, 3)
        assert (stock.used, stock.burned) == (4, 3)


@pytest.mark.parametrize("makers", [1, 2, 5])
def test_no_row_is_handed_out_twice_and_none_is_left_out(makers):
    """By callers that share a stock as Python's lock lets them."""
    num_linears, most, wanted = 3, 40, 35_000
    log: list[list[tuple[int, int, int]]] = [[] for _ in range(4)]

    def take(caller: int, stock: _native.PadStock) -> None:
        random = np.random.default_rng(caller)
        held: list[_native.PadRows] = []
        while sum(rows for takes in log for _, _, rows in takes) < wanted:
            linear = int(random.integers(num_linears))
            if (pads := stock.take(linear, int(random.integers(1, most)))) is None:
                held.clear()
                stock.wait(linear, most, 0.01)
                continue
            log[caller].append((pads.linear, pads.first_row, pads.rows))
            held.insert(int(random.integers(len(held) + 1)), pads)
            del pads, held[3:]

    with stocked([small(outputs) for outputs in (1, 2, 70)], 300, makers) as stock:
        callers = [threading.Thread(target=take, args=(caller, stock)) for caller in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        taken_rows = stock.used + stock.burned
    for linear in range(num_linears):
        next_row = 0
        for first, rows in sorted((first, rows) for takes in log for of, first, rows in takes if of == linear):
            assert first == next_row
            next_row += rows
    assert taken_rows >= wanted


def test_no_row_of_one_caller_comes_twice():
    """10^5 takes, one row each."""
    with stocked([small(1)], 128) as stock:
        for row in range(100_000):
            while (pads := stock.take(0, 1)) is None:
                assert stock.wait(0, 64, SOON_S)
            assert pads.first_row == row


def test_makers_run_when_nobody_else_wants_the_core_and_end_with_the_stock():
    before = threads_of_this_process()
    with stocked([small()], 4, threads=2):
        makers = threads_of_this_process() - before
        assert len(makers) == 2
        deadline = time.monotonic() + SOON_S
        while {os.sched_getscheduler(maker) for maker in makers} != {os.SCHED_IDLE}:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert not makers & threads_of_this_process()


def test_a_stock_that_is_being_made_can_be_closed():
    stock = _native.PadStock(pad_keys(1), [small(5000, 1000).linear], 5000, 2)
    assert stock.wait(0, 1, SOON_S)
    pads = stock.take(0, 1)
    stock.close()
    stock.close()
    assert (stock.available, stock.available_of(0), stock.fault) == (0, 0, None)
    assert stock.take(0, 1) is None
    assert not stock.wait(0, 1, SOON_S)
    del pads
    assert stock.burned == 1


def test_a_stock_that_nobody_holds_ends_its_threads():
    before = threads_of_this_process()
    stock = _native.PadStock(pad_keys(1), [small().linear], 4, 2)
    pads = taken(stock, 0, 1)
    del stock
    gc.collect()
    assert threads_of_this_process() <= before
    assert pads.rows == 1


def threads_of_this_process() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def test_neither_a_core_nor_a_child_gets_a_stock_s_memory():
    """What the kernel says of it: dd, not dumped; wf, wiped on fork."""
    before = bytes_of_mappings("dd", "wf")
    stock = _native.PadStock(pad_keys(1), [small(64).linear], 5000, 0)
    assert stock.num_bytes >= 5000 * 64 * 4
    assert bytes_of_mappings("dd", "wf") >= before + stock.num_bytes
    assert not stock.is_locked
    stock.close()


def test_a_stock_is_locked_where_that_is_asked_for_until_it_is_closed():
    before = bytes_of_mappings("lo")
    stock = _native.PadStock(pad_keys(1), [small(64).linear], 2000, 0, lock=True)
    assert stock.is_locked
    assert bytes_of_mappings("dd", "wf", "lo") >= before + stock.num_bytes
    stock.close()
    assert bytes_of_mappings("lo") < before + stock.num_bytes


def bytes_of_mappings(*flags: str) -> int:
    """Of this process, of those that have all these flags."""
    total = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if kibibytes := re.match(r"Size: +(\d+) kB", line):
            size = int(kibibytes[1]) * 1024
        if line.startswith("VmFlags:") and {*flags} <= set(line.split()[1:]):
            total += size
    return total


def test_a_forked_child_has_no_pads(forked):
    linear = honest(40, 16, 4)
    linear.finish()
    with stocked([linear], 8) as stock:
        pads = taken(stock, 0, 2)
        begin(linear, taken(stock, 0, 2))
        linear.answer()

        def child() -> None:
            for refused in (
                lambda: stock.take(0, 1),
                lambda: stock.wait(0, 1, SOON_S),
                lambda: stock.available,
                lambda: stock.available_of(0),
                lambda: begin(linear, pads, 2),
                lambda: linear.finish(0, 2),
            ):
                with pytest.raises(RuntimeError, match="of the process that made them"):
                    refused()
            # Rows without pads are checked there too.
            linear.begin(2, 1)
            linear.answer()
            assert linear.finish(2, 1)
            stock.close()

        forked(child).join()
        begin(linear, pads, 2)
        linear.answer()
        assert linear.finish()
        assert stock.used == 4
        pads = None
        assert stock.wait(0, 8, SOON_S)


def test_what_a_stock_refuses():
    linear = small().linear
    keys = pad_keys(1)
    for settings, error, match in (
        ((keys, [linear], 0, 1), ValueError, "capacity_rows: got 0, expected 1 at least"),
        ((keys, [linear], -1, 1), IndexError, "capacity_rows: got -1"),
        ((keys, [linear], 1, 257), ValueError, "num_threads: got 257, expected 0 to 256"),
        ((keys, [linear], 1, -1), IndexError, "num_threads: got -1"),
        ((keys, [], 1, 1), ValueError, "linears: got 0, the keys are of 1"),
        ((keys, [linear, linear], 1, 1), ValueError, "linears: got 2, the keys are of 1"),
        ((keys, [linear], 2**62, 1), MemoryError, "bad_alloc"),
        ((keys, [linear], 2**50, 1), MemoryError, "bad_alloc"),
    ):
        with pytest.raises(error, match=match):
            _native.PadStock(*settings)
    linear.set_rows(0, np.ones((3, 4), np.float32))
    stock = _native.PadStock(keys, [linear], 4, 1)
    for call in (lambda: stock.take(1, 1), lambda: stock.wait(1, 1, 0), lambda: stock.available_of(1)):
        with pytest.raises(IndexError, match="linear 1 of a stock that has 1"):
            call()
    with pytest.raises(IndexError, match="rows: got -1"):
        stock.take(0, -1)
    with pytest.raises(ValueError, match="timeout_s: expected 0 or more"):
        stock.wait(0, 1, -1)
    with pytest.raises(ValueError, match="the Linear's weights are in use"):
        linear.set_rows(0, np.ones((3, 4), np.float32))
    stock.close()
    linear.set_rows(0, np.ones((3, 4), np.float32))


def test_the_bytes_of_a_row_are_those_of_its_products():
    linears = [small(outputs).linear for outputs in (1, 65, 300)]
    assert _native.PadStock.row_bytes(linears) == 4 * (1 + 65 + 300)
    stock = _native.PadStock(pad_keys(3), linears, 1000, 0)
    assert 0 <= stock.num_bytes - 1000 * 4 * 366 <= 4096 + 3 * 64
    stock.close()
