"""Slots in anonymous memory, with nothing of an arena around them."""

from __future__ import annotations

import mmap

import numpy as np

from tsqp_shm import _native

BF16, F32, I32, U32 = 1, 2, 3, 4
SLOTS_OFFSET, PAGE = 16384, 4096
NUMPY_DTYPE = {BF16: np.uint16, F32: np.float32, I32: np.int32, U32: np.uint32}


class Arena:
    """Anonymous memory laid out like an arena; `view[i]` is slot i as numpy sees it."""

    def __init__(self, *slots: tuple[int, int, int]) -> None:
        entries, offset = [], SLOTS_OFFSET
        for rows, width, code in slots:
            entries.append((offset, rows, width, code))
            size = rows * width * np.dtype(NUMPY_DTYPE[code]).itemsize
            offset += -(-size // PAGE) * PAGE
        self.memory = mmap.mmap(-1, offset)
        self.slots = _native.SlotTable(self.memory, entries)
        self.view = [
            np.frombuffer(self.memory, NUMPY_DTYPE[code], rows * width, at).reshape(rows, width)
            for at, rows, width, code in entries
        ]
