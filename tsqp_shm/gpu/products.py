"""The model's products with the tensor library's GEMMs, on any device.

Shapes: T tokens, C hidden, H query heads, G kv heads, D head dim, F feed-forward, V vocabulary, R rows.
"""

from __future__ import annotations

from typing import Protocol

import torch

from tsqp_shm import _native
from tsqp_shm.gpu.cpu_decode import as_array
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.kv_cache import KVCache
from tsqp_shm.gpu.weights import Linear, Weights
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.plan import Plan, Slot
from tsqp_shm.shm.protocol import NO_SLOT, Record
from tsqp_shm.shm.tiling import KeyRange, Segment


class Products(Protocol):
    """One step's operations; `GemmProducts` computes any of them, `CpuDecode` those of few rows."""

    def qkv(self, record: Record) -> None:
        """x [T, C] -> qk [T, (H+G)*D]; v stays here."""

    def scores(self, record: Record, tile: list[tuple[Segment, KeyRange]]) -> None:
        """qk -> scores.N: one dense [H, rows, columns] block per segment; appends k and v to the cache."""

    def context(self, record: Record, tile: list[tuple[Segment, KeyRange]]) -> None:
        """scores.N, now probabilities, times v; where an out slot is named, o_proj of all rows -> hidden [T, C]."""

    def gate_up(self, record: Record) -> None:
        """x [T, C] -> gate_up [T, 2F]."""

    def down(self, record: Record) -> None:
        """act [T, F] -> hidden [T, C]."""

    def lm_head(self, record: Record) -> None:
        """x [R, C] -> logits [R, V]."""


class GemmProducts:
    """Products over slots that the device brings in and out.

    Args:
        values: private [T, G*D]: v of the layer at hand.
        heads: private [T, H*D]: the heads' outputs before o_proj.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        weights: Weights,
        device: Device,
        cache: KVCache,
        values: torch.Tensor,
        heads: torch.Tensor,
    ) -> None:
        self._slots = plan.slots
        self._weights = weights
        self._device = device
        self._cache = cache
        self._values, self._heads = values, heads
        self._num_heads, self._kv_heads, self._head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._group = spec.num_heads // spec.num_kv_heads
        # While a tile is computed here, the TEE normalises another, on a CPU device on the same cores: half each.
        # A product of one tile is also too short to pay for waking many threads (docs/performance.md).
        self._threads = torch.get_num_threads()
        self._tile_threads = max(1, self._threads // 2)
        # One tile's heads, head-major, as a batched product wants them.
        tile_elements = plan.geometry["tile_rows"] * spec.num_heads * spec.head_dim
        self._blocks = device.zeros((tile_elements,), values.dtype)

    def qkv(self, record: Record) -> None:
        torch.set_num_threads(self._threads)
        layer = self._weights.layers[record.layer]
        x = self._rows_in(record)
        layer.qk.apply(x, self._rows_out(record))
        layer.v.apply(x, self._values[_rows(record)])

    def scores(self, record: Record, tile: list[tuple[Segment, KeyRange]]) -> None:
        torch.set_num_threads(self._tile_threads)
        qk_slot, width = self._slots[record.in_slot], self._num_heads * self._head_dim
        kv_shape = (-1, self._kv_heads, self._head_dim)
        offset = 0
        for segment, seen in tile:
            rows = slice(segment.first_row, segment.first_row + segment.rows)
            shape = (segment.rows, qk_slot.row_elements)
            qk = self._device.input(qk_slot, rows.start * qk_slot.row_elements, shape)
            keys, values = qk[:, width:].view(kv_shape), self._values[rows].view(kv_shape)
            self._cache.append(record.layer, segment, keys, values)
            # The query heads that share a kv head become rows of one product, so k and v are never expanded.
            query = self._head_major(qk[:, :width]).view(self._kv_heads, -1, self._head_dim)
            keys = self._cache.keys(record.layer, segment.sequence, seen)
            products = (self._kv_heads, self._group * segment.rows, seen.columns)
            scores = self._device.output(self._slots[record.out_slot], offset, products)
            torch.bmm(query, keys, out=scores)
            offset += scores.numel()

    def context(self, record: Record, tile: list[tuple[Segment, KeyRange]]) -> None:
        torch.set_num_threads(self._tile_threads)
        offset = 0
        for segment, seen in tile:
            rows = slice(segment.first_row, segment.first_row + segment.rows)
            shape = (self._kv_heads, self._group * segment.rows, seen.columns)
            probabilities = self._device.input(self._slots[record.in_slot], offset, shape)
            values = self._cache.values(record.layer, segment.sequence, seen)
            blocks = self._blocks_of(segment.rows)
            torch.bmm(probabilities, values, out=blocks.view(self._kv_heads, -1, self._head_dim))
            self._token_major(blocks, self._heads[rows])
            offset += probabilities.numel()
        if record.out_slot != NO_SLOT:
            torch.set_num_threads(self._threads)
            self._weights.layers[record.layer].o.apply(self._heads[_rows(record)], self._rows_out(record))

    def gate_up(self, record: Record) -> None:
        self._linear(self._weights.layers[record.layer].gate_up, record)

    def down(self, record: Record) -> None:
        self._linear(self._weights.layers[record.layer].down, record)

    def lm_head(self, record: Record) -> None:
        self._linear(self._weights.lm_head, record)

    def _linear(self, linear: Linear, record: Record) -> None:
        torch.set_num_threads(self._threads)
        linear.apply(self._rows_in(record), self._rows_out(record))

    def _rows_in(self, record: Record) -> torch.Tensor:
        slot = self._slots[record.in_slot]
        return self._device.input(slot, *_block(slot, record))

    def _rows_out(self, record: Record) -> torch.Tensor:
        slot = self._slots[record.out_slot]
        return self._device.output(slot, *_block(slot, record))

    def _blocks_of(self, rows: int) -> torch.Tensor:
        """Shapes: [H, rows, D]."""
        return self._blocks[: self._num_heads * rows * self._head_dim].view(self._num_heads, rows, self._head_dim)

    def _head_major(self, heads: torch.Tensor) -> torch.Tensor:
        """Shapes: heads [rows, H*D], its rows may lie apart; result [H, rows, D]."""
        blocks = self._blocks_of(heads.shape[0])
        if heads.is_cpu:
            # Whole heads are copied: ten times as fast as the tensor library's general permutation.
            _native.gather_heads(as_array(heads), as_array(blocks))
            return blocks
        return blocks.copy_(heads.view(-1, self._num_heads, self._head_dim).transpose(0, 1))

    def _token_major(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Shapes: blocks [H, rows, D]; out [rows, H*D]."""
        if out.is_cpu:
            _native.scatter_heads(as_array(blocks), as_array(out))
        else:
            out.view(-1, self._num_heads, self._head_dim).copy_(blocks.transpose(0, 1))


def _rows(record: Record) -> slice:
    return slice(record.first_row, record.first_row + record.rows)


def _block(slot: Slot, record: Record) -> tuple[int, tuple[int, int]]:
    return record.first_row * slot.row_elements, (record.rows, slot.row_elements)
