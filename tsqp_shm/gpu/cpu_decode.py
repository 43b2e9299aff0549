"""Decode on a CPU device without the GEMM library: with a row per sequence, reading weights and cache is all the work.

The same operations as `gpu.ops` for steps in which every segment is one row, on numpy views of the same memory: here a
tensor library's own bookkeeping would take longer than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from tsqp_shm import _native
from tsqp_shm.gpu.kv_cache import KVCache
from tsqp_shm.gpu.weights import Linear, Weights
from tsqp_shm.shm.protocol import NO_SLOT, Record
from tsqp_shm.shm.tiling import KeyRange, Segment

Array = npt.NDArray[Any]

# With more rows than this the GEMM library's faster arithmetic pays for its set-up (docs/performance.md).
MAX_LINEAR_ROWS = 4


def is_available(device: torch.device) -> bool:
    """Whether this device is the CPU and the instruction set in use has the kernels."""
    return device.type == "cpu" and _native.has_few_rows_kernels()


class CpuDecode:
    """Operations on steps in which every sequence has one row.

    Args:
        slots: the arena's slots by index, as the device sees them.
        values: private [T, G*D]: v of the layer at hand.
        heads: private [T, H*D]: the heads' outputs before o_proj.
    """

    def __init__(
        self,
        slots: dict[int, torch.Tensor],
        weights: Weights,
        cache: KVCache,
        values: torch.Tensor,
        heads: torch.Tensor,
        num_heads: int,
    ) -> None:
        self._slots = {index: as_array(slot) for index, slot in slots.items()}
        self._flat = {index: slot.reshape(-1) for index, slot in self._slots.items()}
        self._values, self._heads = as_array(values), as_array(heads)
        self._num_heads = num_heads
        self._layers = [
            {
                name: _LinearArrays(linear)
                for name, linear in (
                    ("qk", layer.qk),
                    ("v", layer.v),
                    ("o", layer.o),
                    ("gate_up", layer.gate_up),
                    ("down", layer.down),
                )
            }
            for layer in weights.layers
        ]
        self._lm_head = _LinearArrays(weights.lm_head)
        self._cache = [
            [(as_array(keys), as_array(values)) for keys, values in sequences] for sequences in cache.by_sequence()
        ]

    def qkv(self, record: Record) -> None:
        rows = slice(record.first_row, record.first_row + record.rows)
        layer, x = self._layers[record.layer], self._slots[record.in_slot][rows]
        layer["qk"].apply(x, self._slots[record.out_slot][rows])
        layer["v"].apply(x, self._values[rows])

    def scores(self, record: Record, tile: list[tuple[Segment, KeyRange]]) -> None:
        qk, out = self._slots[record.in_slot], self._flat[record.out_slot]
        cache = self._cache[record.layer]
        offset = 0
        for segment, seen in tile:
            keys, values = cache[segment.sequence]
            end = offset + self._num_heads * seen.columns
            row = segment.first_row
            _native.decode_scores(
                qk[row], self._values[row], keys, values, segment.position, seen.start, out[offset:end]
            )
            offset = end

    def context(self, record: Record, tile: list[tuple[Segment, KeyRange]]) -> None:
        probabilities, cache = self._flat[record.in_slot], self._cache[record.layer]
        offset = 0
        for segment, seen in tile:
            end = offset + self._num_heads * seen.columns
            _, values = cache[segment.sequence]
            _native.decode_context(probabilities[offset:end], values, seen.start, self._heads[segment.first_row])
            offset = end
        if record.out_slot != NO_SLOT:
            rows = slice(record.first_row, record.first_row + record.rows)
            self._layers[record.layer]["o"].apply(self._heads[rows], self._slots[record.out_slot][rows])

    def gate_up(self, record: Record) -> None:
        self._linear(self._layers[record.layer]["gate_up"], record)

    def down(self, record: Record) -> None:
        self._linear(self._layers[record.layer]["down"], record)

    def lm_head(self, record: Record) -> None:
        self._linear(self._lm_head, record)

    def _linear(self, linear: _LinearArrays, record: Record) -> None:
        rows = slice(record.first_row, record.first_row + record.rows)
        linear.apply(self._slots[record.in_slot][rows], self._slots[record.out_slot][rows])


class _LinearArrays:
    """A Linear as the native kernels take it, and for more rows as the GEMM library does."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self._weight = as_array(linear.weight)
        self._bias = None if linear.bias is None else as_array(linear.bias)

    def apply(self, x: Array, out: Array) -> None:
        if x.shape[0] <= MAX_LINEAR_ROWS:
            _native.few_rows_linear(x, self._weight, self._bias, out)
        else:
            self._linear.apply(_as_tensor(x), _as_tensor(out))


def as_array(tensor: torch.Tensor) -> Array:
    """The same memory as numpy sees it; bfloat16 shows as uint16."""
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    array: Array = bits.numpy()
    return array


def _as_tensor(array: Array) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
