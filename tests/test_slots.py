"""Slots: whose rows are whose, and one memory behind every way to look at it."""

import numpy as np
import pytest
from arenas import new_arena

from tsqp_shm import _native
from tsqp_shm.errors import SlotOwnershipError
from tsqp_shm.shm import layout
from tsqp_shm.shm.plan import Plan, SlotShape
from tsqp_shm.shm.slots import Slots, open_slots

PLAN = Plan.of_slots([("x", "bfloat16", 12, 40), ("y", "float32", 6, 8), ("z", "int32", 5, 4)])
X, Y, Z = PLAN.slots


@pytest.fixture
def arena():
    with new_arena(PLAN) as arena:
        yield arena


@pytest.fixture
def slots(arena):
    with open_slots(arena) as slots:
        yield slots


@pytest.mark.parametrize("slot", PLAN.slots, ids=lambda slot: slot.dtype)
def test_a_view_has_the_slots_shape_and_dtype(slots, slot):
    view = slots.view(slot)
    assert view.shape == (slot.num_rows, slot.row_elements)
    assert view.dtype == layout.DTYPES[slot.dtype].numpy


def test_bfloat16_shows_as_its_bits(slots):
    _native.store_rows(slots.table, X.index, 0, 1, np.ones((1, 40), np.float32))
    assert slots.view(X).dtype == np.uint16
    assert (slots.view(X, 0, 1) == 0x3F80).all()


def test_the_native_table_and_the_view_are_the_same_bytes(slots):
    values = np.arange(48, dtype=np.float32).reshape(6, 8)
    _native.store_rows(slots.table, Y.index, 0, 6, values)
    np.testing.assert_array_equal(slots.view(Y), values)
    slots.view(Y)[3] = -1
    out = np.empty((1, 8), np.float32)
    _native.load_rows(slots.table, Y.index, 3, 1, out)
    assert (out == -1).all()


def test_a_view_is_the_arena_itself(slots, arena):
    slots.view(Z)[:] = 0x01020304
    assert arena.buffer[Z.offset_bytes : Z.offset_bytes + 4] == b"\x04\x03\x02\x01"


def test_using_a_lent_slot_names_it_and_the_operation(slots):
    slots.loans.lend(X.index, 0, 12, "QKV")
    for use in (slots.own, slots.view):
        with pytest.raises(SlotOwnershipError) as caught:
            use(X)
        assert (caught.value.slot, caught.value.operation) == ("x", "QKV")


@pytest.mark.parametrize(("first_row", "rows"), [(0, 4), (8, 4), (0, 1), (11, 1)])
def test_rows_beside_the_lent_ones_stay_usable(slots, first_row, rows):
    slots.loans.lend(X.index, 4, 4, "QKV")
    assert slots.view(X, first_row, rows).shape == (rows, 40)


@pytest.mark.parametrize(("first_row", "rows"), [(0, 5), (4, 4), (5, 1), (7, 5), (0, 12)])
def test_rows_that_touch_the_lent_ones_are_refused(slots, first_row, rows):
    slots.loans.lend(X.index, 4, 4, "QKV")
    with pytest.raises(SlotOwnershipError):
        slots.view(X, first_row, rows)


def test_other_slots_stay_usable(slots):
    slots.loans.lend(X.index, 0, 12, "QKV")
    slots.view(Y)


def test_taking_back_restores_the_slot(slots):
    slots.loans.lend(X.index, 0, 12, "QKV")
    slots.loans.take_back()
    slots.view(X)


def test_rows_lent_twice_are_taken_back_twice(slots):
    slots.loans.lend(X.index, 0, 12, "SCORES")
    slots.loans.lend(X.index, 0, 12, "CONTEXT")
    slots.loans.take_back()
    with pytest.raises(SlotOwnershipError, match="CONTEXT"):
        slots.view(X)
    slots.loans.take_back()
    slots.view(X)


def test_rows_are_taken_back_in_the_order_in_which_they_were_lent(slots):
    slots.loans.lend(X.index, 0, 4, "SCORES")
    slots.loans.lend(X.index, 4, 8, "CONTEXT")
    slots.loans.take_back()
    slots.view(X, 0, 4)
    with pytest.raises(SlotOwnershipError, match="CONTEXT"):
        slots.view(X, 4, 8)


def test_own_gives_the_index_for_native_code(slots):
    assert [slots.own(slot) for slot in PLAN.slots] == [0, 1, 2]


def test_released_slots_no_longer_hold_the_arena(arena):
    with open_slots(arena) as slots:
        table = slots.table
    arena.buffer.close()  # raises BufferError while anything holds it
    with pytest.raises(ValueError, match="release"):
        _native.load_rows(table, Y.index, 0, 1, np.empty((1, 8), np.float32))


def test_a_slot_outside_the_arena_is_refused(arena):
    end = PLAN.total_bytes
    for entry in [(end, 1, 1, 1), (Y.offset_bytes, 1 << 40, 8, 2), (Y.offset_bytes + 8, 1, 1, 1), (0, 1, 1, 1)]:
        with pytest.raises(IndexError, match="inside the arena"):
            _native.SlotTable(arena.buffer, [entry])


def test_values_are_written_to_the_first_rows(slots):
    slots.write(Z, np.arange(8, dtype=np.int32).reshape(2, 4))
    assert slots.view(Z).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [0] * 4, [0] * 4, [0] * 4]
    with pytest.raises(IndexError):
        slots.write(Z, np.zeros((6, 4), np.int32))
    slots.loans.lend(Z.index, 1, 1, "EMBED")
    with pytest.raises(SlotOwnershipError):
        slots.write(Z, np.zeros((2, 4), np.int32))


@pytest.mark.parametrize("slot", [X, Y], ids=lambda slot: slot.dtype)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1, 63, 64, 65])
def test_one_number_that_is_not_finite_is_found(slots, slot, bad, at):
    values = np.full((2, slot.row_elements), np.finfo(np.float32).max / 2, np.float32)
    slots.write(slot, values)
    assert _native.all_finite(slots.table, slot.index, 0, values.size)
    at %= values.size
    values.flat[at] = bad
    slots.write(slot, values)
    for count in range(values.size):
        assert _native.all_finite(slots.table, slot.index, 0, count) == (count <= at)
    for first in range(0, values.size, 4):
        assert _native.all_finite(slots.table, slot.index, first, values.size - first) == (first > at)


def test_elements_outside_a_slot_are_refused(slots):
    most = Y.num_rows * Y.row_elements
    for offset, count in ((0, most + 1), (most, 1), (-1, 1), (2**62, 2**62)):
        with pytest.raises(IndexError):
            _native.all_finite(slots.table, Y.index, offset, count)
    with pytest.raises(TypeError):
        _native.all_finite(slots.table, Z.index, 0, 1)


def test_slots_of_its_own_are_used_as_those_of_an_arena():
    shapes = [
        ("x", "float32", 3, 8),
        ("own", "float32", 5, 8, "rows", "private"),
        ("last", "int32", 1, 4, "rows", "private"),
    ]
    plan = Plan.of_slots([SlotShape(*shape) for shape in shapes])
    values = np.arange(16, dtype=np.float32).reshape(2, 8)
    with new_arena(plan) as arena, open_slots(arena) as slots:
        for slot in plan.slots[:2]:
            slots.write(slot, values)
            assert np.array_equal(slots.view(slot, 0, 2), values)
        read = np.zeros((1, 8), np.float32)
        _native.load_rows(slots.table, plan.slot("own").index, 1, 1, read)
        assert np.array_equal(read[0], values[1])
        with pytest.raises(IndexError):
            _native.load_rows(slots.table, plan.slot("own").index, 5, 1, read)
        assert len(slots.table) == 3


def test_slots_need_no_arena():
    plan = Plan.of_slots([SlotShape("own", "float32", 5, 8, place="private")])
    slots = Slots(plan, None)
    slots.write(plan.slots[0], np.ones((5, 8), np.float32))
    assert slots.view(plan.slots[0]).sum() == 40
    slots.release()
    with pytest.raises(ValueError, match="released"):
        _native.load_rows(slots.table, 0, 0, 1, np.zeros((1, 8), np.float32))


def test_a_private_slot_is_refused_that_does_not_lie_in_its_memory():
    memory = bytearray(8192)
    _native.SlotTable(None, [], memory, [(4096, 2, 8, 2)])
    for entry in ((4096, 129, 8, 2), (8192, 1, 8, 2), (4, 1, 8, 2), (0, 1, 1 << 62, 2)):
        with pytest.raises(IndexError):
            _native.SlotTable(None, [], memory, [entry])
