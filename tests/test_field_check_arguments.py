"""Whatever a check is called with, it refuses the call or writes only where it may."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from checked_linear import FIELD, OUT, OWN, CheckedLinear, M, X, Y
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_memory import BF16, F32, I32, U32, Arena

from tsqp_shm import _native

REFUSALS = (ValueError, IndexError, TypeError)
OUTPUTS, INPUTS = 6, 4
# Rows, row elements, dtype: m and y, what is like them in all but one thing, and the same of private memory.
SHARED = [(5, 4, U32), (5, 6, U32), (5, 4, F32), (5, 6, I32), (4, 4, U32), (3, 8, BF16)]
PRIVATE = [(5, 4, F32), (5, 6, F32), (5, 4, U32), (7, 6, U32), (2, 4, F32), (5, 6, BF16)]
ANY_NUMBER = st.integers(-(2**63), 2**63 - 1)
SLOTS = st.one_of(st.integers(-1, len(SHARED) + len(PRIVATE)), ANY_NUMBER)
COUNTS = st.one_of(st.integers(0, 3), st.integers(0, 3), st.integers(-1, 6), ANY_NUMBER)
DTYPES = st.sampled_from([np.uint32, np.uint32, np.uint32, np.int32, np.float32, np.uint64, np.dtype(">u4")])


@st.composite
def arrays(draw: st.DrawFn, rows: int, columns: int) -> np.ndarray | None:
    """As a rule what fits; now and then of another shape or type, not dense, not writeable, or none."""
    shape = draw(st.sampled_from([(rows, columns)] * 4 + [(rows, columns + 1), (rows + 1, columns), (columns,), ()]))
    array = np.zeros(shape, draw(DTYPES))
    change = draw(st.integers(0, 15))
    if change >= 9:
        return None
    if change == 8:
        array.flags.writeable = False
    return array[..., ::-1] if change == 7 and array.ndim else array


def intact(memory: Arena, before: list[np.ndarray], written: int | None, rows: slice) -> bool:
    """All slots are as they were, but for those rows of one."""
    for index, (view, old) in enumerate(zip(memory.view, before, strict=True)):
        new = view.copy()
        if index == written:
            new[rows] = old[rows]
        if new.tobytes() != old.tobytes():
            return False
    return True


def test_what_a_check_refuses():
    random = np.random.default_rng(0)
    linear = CheckedLinear(np.ones((6, 4), np.float32), 3, random)
    good = np.ones((2, 6), np.uint32)
    for vectors, error, match in (
        (np.ones((2, 5), np.uint32), ValueError, "vectors: expected shape"),
        (good[0], ValueError, "vectors: expected shape"),
        (good.astype(np.int32), TypeError, "vectors: expected uint32"),
        (good.astype(np.float32), TypeError, "vectors: expected uint32"),
        (np.ones((2, 12), np.uint32)[:, ::2], ValueError, "vectors: expected a dense, aligned array"),
        (np.ones((0, 6), np.uint32), ValueError, "vectors: got 0, expected 1 to 16"),
        (np.ones((17, 6), np.uint32), ValueError, "vectors: got 17, expected 1 to 16"),
        (np.full((1, 6), FIELD, np.uint32), ValueError, r"vectors\[0, 0\]: expected less than 2\^31 - 1$"),
    ):
        with pytest.raises(error, match=match):
            _native.FieldCheck(linear.linear, vectors)
    check, slots = linear.check, linear.slots
    for x, m, first, rows, error, match in (
        (OUT, M, 0, 1, ValueError, "slot 3: its rows have 6 elements, expected 4"),
        (X, Y, 0, 1, ValueError, "slot 1: its rows have 6 elements, expected 4"),
        (M, M, 0, 1, TypeError, "x_slot: expected a slot of f32"),
        (X, X, 0, 1, TypeError, "m_slot: expected a slot of u32"),
        (X, M, 2, 2, IndexError, "of slot 2, which has 3"),
        (X, M, -1, 1, IndexError, "first_row: got -1"),
        (X, M, 0, -1, IndexError, "rows: got -1"),
        (9, M, 0, 1, IndexError, "slot 9 is not in the plan"),
        (-1, M, 0, 1, IndexError, "x_slot: got -1"),
    ):
        with pytest.raises(error, match=match):
            check.begin(slots, x, m, first, rows)
    check.begin(slots, X, M, 0, 3)
    for y, out, error, match in (
        (M, OUT, ValueError, "slot 0: its rows have 4 elements, expected 6"),
        (Y, X, ValueError, "slot 2: its rows have 4 elements, expected 6"),
        (OWN, OUT, TypeError, "y_slot: expected a slot of u32"),
        (Y, Y, TypeError, "out_slot: expected a slot of f32"),
    ):
        with pytest.raises(error, match=match):
            check.finish(slots, y, out, 0, 3)
    for copy, error, match in (
        (np.zeros((3, 5), np.uint32), ValueError, "copy: expected shape"),
        (np.zeros((2, 6), np.uint32), ValueError, "copy: expected shape"),
        (np.zeros((3, 6), np.int32), TypeError, "copy: expected uint32"),
        (np.frombuffer(bytes(72), np.uint32).reshape(3, 6), ValueError, "copy: expected a writeable array"),
    ):
        with pytest.raises(error, match=match):
            check.finish(slots, Y, OUT, 0, 3, copy)
    linear.answer()
    assert linear.finish()


def test_floats_lie_in_private_memory_only():
    """What a wrong number of a slot would put before the other side is refused."""
    linear = CheckedLinear(np.ones((4, 4), np.float32), 2, np.random.default_rng(0))
    memory = Arena((2, 4, F32), (2, 4, U32), own=((2, 4, F32), (2, 4, F32)))
    with pytest.raises(ValueError, match="x_slot: expected a slot of private memory"):
        linear.check.begin(memory.slots, 0, 1, 0, 2)
    linear.check.begin(memory.slots, 2, 1, 0, 2)
    with pytest.raises(ValueError, match="out_slot: expected a slot of private memory"):
        linear.check.finish(memory.slots, 1, 0, 0, 2)


def test_rows_that_share_a_word_are_not_written():
    memory = Arena((2, 3, U32), own=((2, 3, F32),))
    linear = _native.FieldLinear(4, 3)
    check = _native.FieldCheck(linear, np.ones((1, 4), np.uint32))
    with pytest.raises(ValueError, match="m_slot: a row takes 12 bytes, expected whole words of 8"):
        check.begin(memory.slots, 1, 0, 0, 1)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_a_call_is_refused_or_writes_only_where_it_may(data):
    memory = Arena(*SHARED, own=PRIVATE)
    for view in memory.view:
        view[:] = 1
    linear = _native.FieldLinear(OUTPUTS, INPUTS)
    linear.set_rows(0, np.ones((OUTPUTS, INPUTS), np.float32))
    check = _native.FieldCheck(linear, np.full((2, OUTPUTS), 5, np.uint32))
    begun: set[int] = set()
    for _ in range(data.draw(st.integers(1, 8))):
        is_begin = data.draw(st.booleans())
        usual = (len(SHARED), 0) if is_begin else (1, len(SHARED) + 1)
        slots = data.draw(st.one_of(st.just(usual), st.just(usual), st.tuples(SLOTS, SLOTS)))
        first, count = data.draw(COUNTS), data.draw(COUNTS)
        copy: Any = data.draw(arrays(max(0, min(count, 6)), INPUTS if is_begin else OUTPUTS))
        before = [view.copy() for view in memory.view]
        rows: set[int] = set()
        with contextlib.suppress(*REFUSALS):
            if is_begin:
                check.begin(memory.slots, *slots, first, count, copy)
            else:
                assert isinstance(check.finish(memory.slots, *slots, first, count, copy), bool)
            rows = set(range(first, first + count))
        assert intact(memory, before, slots[1] if rows else None, slice(first, first + count) if rows else slice(0))
        # Rows are taken and given back as the calls that were not refused say.
        assert rows.isdisjoint(begun) if is_begin else rows <= begun
        begun = begun | rows if is_begin else begun - rows


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_vectors_are_refused_or_a_check_is_made(data):
    linear = _native.FieldLinear(OUTPUTS, INPUTS)
    vectors: Any = data.draw(arrays(data.draw(st.integers(0, 18)), OUTPUTS))
    words = data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=4))
    if vectors is not None and vectors.dtype == np.uint32 and vectors.flags.writeable:
        vectors.flat[: len(words)] = words[: vectors.size]
    try:
        _native.FieldCheck(linear, vectors)
    except REFUSALS:
        return
    assert vectors.shape[1:] == (OUTPUTS,)
    assert 1 <= len(vectors) <= 16
    assert (vectors < FIELD).all()
