"""Fuzz target for the arguments of the native kernels: python kernels.py [libFuzzer's arguments]

Whatever slots, rows, shapes and indices it is called with, a kernel refuses the call or writes where it may: to the
rows it was told and the word they end in, or to the private array it was given. ASan watches the ends of the arena and
of the arrays, which is why they are blocks of the heap of exactly their size; what lies between the slots is compared.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import Any

import numpy as np

from tsqp_shm.shm import layout

try:
    import fuzz_kernels as native  # instrumented, with `run`; see native/fuzz/kernels.cpp
except ImportError:
    from tsqp_shm import _native as native

BF16, F32, I32 = 1, 2, 3
# dtype, rows, row elements. Two of each shape that a kernel wants twice; the last ends where the arena ends.
SHAPES = [(BF16, 5, 8), (BF16, 5, 8), (F32, 5, 8), (F32, 5, 8), (BF16, 5, 16), (F32, 5, 16), (I32, 6, 4), (BF16, 9, 19)]
ELEMENT_BYTES = {BF16: 2, F32: 4, I32: 4}
REFUSALS = (ValueError, IndexError, TypeError)


class Input:
    """Arguments out of the fuzzer's bytes; zeros when they are at their end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def bytes(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece.ljust(size, b"\0")

    def number(self) -> int:
        """Near zero as a rule, and any 64 bits now and then."""
        byte = self.bytes(1)[0]
        return int.from_bytes(self.bytes(8), "little", signed=True) if byte == 0xFF else byte - 8

    def optional(self) -> int | None:
        number = self.number()
        return None if number == -8 else number

    def near(self, expected: int) -> int:
        """What fits, as a rule: a call that is refused for its first argument says nothing of the others."""
        byte = self.bytes(1)[0]
        return max(0, expected + byte - 0xF0 if byte >= 0xE0 else expected)

    def size(self) -> int:
        return self.bytes(1)[0] % 24

    def array(self, dtype: type, *shape: int) -> np.ndarray[Any, Any]:
        """Private memory with drawn values; now and then of another type, or not writeable."""
        choice = self.bytes(1)[0]
        if choice == 0xFE:
            dtype = np.float64
        # A block of the heap of its own: numpy keeps small arrays in blocks that it uses again.
        memory = bytearray(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        memory[:] = (self.bytes(min(len(memory), 32)) * (len(memory) // 32 + 1))[: len(memory)]
        array = np.frombuffer(memory if choice != 0xFD else bytes(memory), dtype).reshape(shape)
        return array[:, ::2] if choice == 0xFC and array.ndim > 1 else array

    def indices(self, size: int) -> np.ndarray[Any, Any]:
        memory = bytearray(4 * size)
        array = np.frombuffer(memory, np.int32)
        array[:] = np.frombuffer(self.bytes(size), np.int8)
        return array


def whole_words(size_bytes: int) -> int:
    return -(-size_bytes // 8) * 8


def arena(input: Input) -> tuple[bytearray, list[tuple[int, int, int, int]]]:
    entries = []
    offset_bytes = layout.SLOTS_OFFSET_BYTES
    for dtype, rows, row_elements in SHAPES:
        entries.append((offset_bytes, rows, row_elements, dtype))
        end = offset_bytes + whole_words(rows * row_elements * ELEMENT_BYTES[dtype])
        offset_bytes += layout.PAGE_BYTES
    memory = bytearray(end)
    memory[layout.SLOTS_OFFSET_BYTES :] = (input.bytes(64) * (end // 64))[: end - layout.SLOTS_OFFSET_BYTES]
    return memory, entries


def call(slots: Any, input: Input) -> list[int]:
    """One call with drawn arguments. Returns the slots that it may have written to."""
    number, near = input.number, input.near
    kernel = input.bytes(1)[0] % 6
    if kernel == 5:
        gate_up, out = number(), number()
        native.silu_mul(slots, gate_up, out, number(), number())
        return [out]
    slot = number()
    width = SHAPES[slot][2] if 0 <= slot < len(SHAPES) else 8
    if kernel == 4:
        window = input.optional()
        native.softmax(slots, slot, number(), number(), number(), number(), 0.5, number(), window)
        return [slot]
    rows = number()
    height = min(max(rows, 0), 24)
    if kernel == 0:
        hidden = near(width)
        index = input.indices(near(height)) if input.bytes(1)[0] % 2 else None
        residual, weight = input.array(np.float32, near(height + 1), hidden), input.array(np.float32, near(hidden))
        first_row, delta = number(), input.optional()
        native.add_rms_norm(slots, slot, number(), delta, residual, index, first_row, rows, weight, 1e-5)
        return [slot]
    if kernel == 3:
        dim = near(4) * 2
        half, length, positions = dim // 2, input.size(), input.indices(near(height))
        cos, sin = input.array(np.float32, length, half), input.array(np.float32, near(length), near(half))
        native.rope(slots, slot, number(), rows, positions, cos, sin, near(width // max(dim, 1)), near(dim))
        return [slot]
    dtype = np.int32 if near(0) else np.float32
    if 0 <= slot < len(SHAPES) and SHAPES[slot][0] == I32:
        dtype = np.int32
    array = input.array(dtype, near(height), near(width))
    if kernel == 1:
        native.load_rows(slots, slot, number(), rows, array)
        return []
    native.store_rows(slots, slot, number(), rows, array)
    return [slot]


def kernels(data: bytes) -> None:
    input = Input(data)
    names = native.instruction_sets()
    native.use_instruction_set(names[input.bytes(1)[0] % len(names)])
    memory, entries = arena(input)
    slots = native.SlotTable(memory, entries)
    while input:
        before = bytes(memory)
        written: list[int] = []
        with contextlib.suppress(REFUSALS):
            written = call(slots, input)
        for index in written:
            offset_bytes, rows, row_elements, dtype = entries[index]
            end = offset_bytes + whole_words(rows * row_elements * ELEMENT_BYTES[dtype])
            before = before[:offset_bytes] + bytes(memory[offset_bytes:end]) + before[end:]
        assert before == memory, "a kernel wrote outside the slot it was told"
    slots.release()


if __name__ == "__main__":
    # libFuzzer gives its first argument to a shell where it starts itself again.
    sys.exit(native.run([shlex.join([sys.executable, sys.argv[0]]), *sys.argv[1:]], kernels))
