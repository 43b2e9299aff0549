"""Slots in anonymous memory, with nothing of an arena around them."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from tsqp_shm import _native

BF16, F32, I32, U32 = 1, 2, 3, 4
SLOTS_OFFSET, PAGE = 16384, 4096
NUMPY_DTYPE = {BF16: np.uint16, F32: np.float32, I32: np.int32, U32: np.uint32}


class Arena:
    """Anonymous memory laid out like an arena; `view[i]` is slot i as numpy sees it.

    Args:
        own: slots of private memory, whose numbers follow on those of the arena.
    """

    def __init__(self, *slots: tuple[int, int, int], own: Sequence[tuple[int, int, int]] = ()) -> None:
        self.view: list[np.ndarray] = []
        self.memory, entries = self._lay_out(SLOTS_OFFSET, slots)
        if own:
            self.own_memory, own_entries = self._lay_out(0, own)
            self.slots = _native.SlotTable(self.memory, entries, self.own_memory, own_entries)
        else:
            self.slots = _native.SlotTable(self.memory, entries)

    def _lay_out(
        self, offset: int, slots: Sequence[tuple[int, int, int]]
    ) -> tuple[mmap.mmap, list[tuple[int, int, int, int]]]:
        entries = []
        for rows, width, code in slots:
            entries.append((offset, rows, width, code))
            size = rows * width * np.dtype(NUMPY_DTYPE[code]).itemsize
            offset += -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, offset)
        for at, rows, width, code in entries:
            self.view.append(np.frombuffer(memory, NUMPY_DTYPE[code], rows * width, at).reshape(rows, width))
        return memory, entries
