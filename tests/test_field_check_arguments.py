"""Whatever a check is called with, it refuses the call or writes only where it may."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from checked_linear import FIELD
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_memory import BF16, F32, I32, U32, Arena

from tsqp_shm import _native

REFUSALS = (ValueError, IndexError, TypeError)
OUTPUTS, INPUTS = 6, 4
# Rows, row elements, dtype: m and y, what is like them in all but one thing, and the same of private memory.
SHARED = [(5, 4, U32), (5, 6, U32), (5, 4, F32), (5, 6, I32), (4, 4, U32), (3, 8, BF16)]
OWN = [(5, 4, F32), (5, 6, F32), (5, 4, U32), (7, 6, U32), (2, 4, F32), (5, 6, BF16)]
ANY_NUMBER = st.integers(-(2**63), 2**63 - 1)
SLOTS = st.one_of(st.integers(-1, len(SHARED) + len(OWN)), ANY_NUMBER)
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


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_a_call_is_refused_or_writes_only_where_it_may(data):
    memory = Arena(*SHARED, own=OWN)
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
