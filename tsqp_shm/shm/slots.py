"""Slots on the TEE's side: those of an arena, whose they are at the moment, and those of its own memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from tsqp_shm import _native
from tsqp_shm.errors import SlotOwnershipError
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan, Slot


class Slots:
    """The slots of a plan, and which of their rows are handed over to the other side.

    Args:
        arena: where the shared ones lie; None: the plan has none.

    Attributes:
        loans: the rows that are handed over; `native/border/loans.h`. Private memory: the other side cannot change it.
    """

    def __init__(self, plan: Plan, arena: Arena | None) -> None:
        self.plan = plan
        self.loans = _native.Loans()
        buffer = None if arena is None else arena.buffer
        self._own = own = _own_memory(plan.private_bytes) if plan.private_bytes else None
        self.table = _native.SlotTable(buffer, _entries(plan.shared_slots), own, _entries(plan.private_slots))
        # UNTRUSTED: for `view` alone.
        self._arrays = {
            slot.index: _array(memory, slot)
            for memory, slots in ((buffer, plan.shared_slots), (own, plan.private_slots))
            for slot in slots
            if memory is not None
        }

    def own(self, slot: Slot, first_row: int = 0, rows: int | None = None) -> int:
        """Asserts that this side owns the rows.

        Returns:
            The slot's index, for the native kernels.

        Raises:
            SlotOwnershipError: some of the rows are handed over.
        """
        end_row = slot.num_rows if rows is None else first_row + rows
        operation = self.loans.holder(slot.index, first_row, end_row)
        if operation is not None:
            raise SlotOwnershipError(slot.name, operation)
        return slot.index

    def lock(self) -> int:
        """Has the system keep the slots of its own in memory. Returns 0, or the number of the error it refuses with."""
        return 0 if self._own is None else _native.lock_memory(self._own)

    @property
    def num_lent(self) -> int:
        """How many runs of rows are handed over."""
        return self.loans.count

    def view(self, slot: Slot, first_row: int = 0, rows: int | None = None) -> npt.NDArray[Any]:
        """The rows as a numpy array over the arena, without a copy; bfloat16 shows as uint16.

        UNTRUSTED: an element may change between two looks at it. The engine takes none: its kernels read each once.

        Shapes: [rows, row_elements].

        Raises:
            SlotOwnershipError: some of the rows are handed over.
        """
        self.own(slot, first_row, rows)
        end_row = slot.num_rows if rows is None else first_row + rows
        array: npt.NDArray[Any] = self._arrays[slot.index][first_row:end_row]
        return array

    def write(self, slot: Slot, values: npt.NDArray[Any]) -> None:
        """Copies values into the first rows of an i32 slot, or of another from f32.

        Shapes: values [rows, row_elements].

        Raises:
            SlotOwnershipError: some of the rows are handed over.
        """
        _native.store_rows(self.table, self.own(slot, 0, len(values)), 0, len(values), values)

    def release(self) -> None:
        """Drops every view of the arena, and the memory of its own."""
        self._arrays.clear()
        self._own = None
        self.table.release()


@contextmanager
def open_slots(arena: Arena) -> Iterator[Slots]:
    """Slots that are released at the end of the block, so that the arena can be unmapped."""
    slots = Slots(arena.plan, arena)
    try:
        yield slots
    finally:
        slots.release()


def slot_table(arena: Arena) -> _native.SlotTable:
    """The arena's slots as native code takes them. Holds the mapping until its `release`."""
    return _native.SlotTable(arena.buffer, _entries(arena.plan.shared_slots))


def slot_array(arena: Arena, slot: Slot) -> npt.NDArray[Any]:
    """A slot's rows over the arena, whoever owns them, without a copy; the array holds the mapping.

    UNTRUSTED: in the TEE process only for who looks at the bytes from outside of the model, a test or a benchmark.

    Shapes: [num_rows, row_elements]; bfloat16 shows as uint16.
    """
    return _array(arena.buffer, slot)


def _own_memory(size_bytes: int) -> mmap.mmap:
    """Memory that a forked child has a copy of, and no other process anything."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Where the system has no huge pages, small ones do.
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _entries(slots: Iterable[Slot]) -> list[tuple[int, int, int, int]]:
    return [(slot.offset_bytes, slot.num_rows, slot.row_elements, layout.DTYPES[slot.dtype].code) for slot in slots]


def _array(memory: mmap.mmap, slot: Slot) -> npt.NDArray[Any]:
    # UNTRUSTED: where the memory is an arena's, an element may change between two looks.
    count = slot.num_rows * slot.row_elements
    flat: npt.NDArray[Any] = np.frombuffer(memory, layout.DTYPES[slot.dtype].numpy, count, slot.offset_bytes)
    return flat.reshape(slot.num_rows, slot.row_elements)
