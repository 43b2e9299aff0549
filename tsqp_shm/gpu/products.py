"""The model's products, and how the tensor library's GEMMs compute them on any device and in any dtype.

Shapes: T tokens, C hidden, H query heads, G kv heads, D head dim, F feed-forward, V vocabulary, R rows.
"""

from __future__ import annotations

from typing import Protocol

import torch

from tsqp_shm.gpu.device import TORCH_DTYPES, Device, rows_of
from tsqp_shm.gpu.kv_cache import BlockTable, KVCache
from tsqp_shm.gpu.weights import Weights
from tsqp_shm.model.network import Network
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import NO_SLOT, Record
from tsqp_shm.shm.tiling import KeyRange, Segment, key_range


class Products(Protocol):
    """One step's operations."""

    def begin_step(self, segments: list[Segment]) -> None:
        """Makes room in the cache. Raises ProtocolError where a segment does not fit."""

    def embed(self, record: Record) -> None:
        """tokens [T, 1] i32 -> hidden [T, C]."""

    def qkv(self, record: Record) -> None:
        """x [T, C] -> qk [T, (H+G)*D]; v stays here."""

    def scores(self, record: Record) -> None:
        """qk -> scores.N: one dense [H, rows, columns] block per segment; appends k and v to the cache.

        Columns that no row of a segment may see need not be written.
        """

    def context(self, record: Record) -> None:
        """scores.N, now probabilities, times v; where an out slot is named, o_proj of its rows -> hidden [T, C]."""

    def linear(self, record: Record) -> None:
        """in_slot [T, inputs] -> out_slot [T, outputs] by the Linear of the network that the record names."""


class GemmProducts:
    """Products over slots that the device brings in and out."""

    def __init__(
        self, network: Network, plan: Plan, weights: Weights, device: Device, blocks: BlockTable | None = None
    ) -> None:
        limits = plan.limits
        dtype = weights.embedding.dtype
        tokens = limits.max_batch_tokens
        self._slots = plan.slots
        *linears, lm_head = weights.linears
        self._embedding = weights.embedding
        self._linears = (*linears, lm_head.giving(TORCH_DTYPES[plan.slot("logits").dtype]))
        # Of each layer, q and k together, v, and o.
        self._attention = [
            (*self._linears[of.qkv.index].split(of.q_width + of.kv_width), self._linears[of.o.index])
            for of in (layer.attention for layer in network.layers)
        ]
        self._device = device
        self._windows = network.windows
        blocks = blocks or BlockTable.identity(limits.max_num_seqs, limits.max_model_len)
        self._cache = KVCache(network, blocks, limits.max_model_len, dtype, device)
        self._segments: list[Segment] = []
        # Private: v [T, G*D] of the layer at hand, and the heads' outputs [T, H*D] before o_proj.
        self._values = device.zeros((tokens, network.num_kv_heads * network.head_dim), dtype)
        self._heads = device.zeros((tokens, network.num_heads * network.head_dim), dtype)
        self._num_heads, self._kv_heads, self._head_dim = network.num_heads, network.num_kv_heads, network.head_dim
        self._group = network.num_heads // network.num_kv_heads
        # While a tile is computed here, the TEE normalises another, on a CPU device on the same cores: half each.
        self._threads = torch.get_num_threads()
        self._tile_threads = max(1, self._threads // 2)
        self._use_threads = torch.set_num_threads if device.torch_device.type == "cpu" else _leave_threads
        # One tile's heads, head-major, as a batched product wants them.
        self._blocks = device.zeros((limits.tile_rows * network.num_heads * network.head_dim,), dtype)

    def begin_step(self, segments: list[Segment]) -> None:
        self._cache.begin_step(segments)
        self._segments = segments

    def embed(self, record: Record) -> None:
        tokens = self._device.input(self._slots[record.in_slot], record.first_row, (record.rows,))
        self._rows_out(record).copy_(torch.index_select(self._embedding, 0, tokens))

    def qkv(self, record: Record) -> None:
        self._use_threads(self._threads)
        qk, v, _ = self._attention[record.target]
        x = self._rows_in(record)
        qk.apply(x, self._rows_out(record))
        v.apply(x, self._values[_rows(record)])

    def scores(self, record: Record) -> None:
        self._use_threads(self._tile_threads)
        qk_slot, width = self._slots[record.in_slot], self._num_heads * self._head_dim
        kv_shape = (-1, self._kv_heads, self._head_dim)
        offset = 0
        for segment, seen in self._tile(record):
            rows = slice(segment.first_row, segment.first_row + segment.rows)
            shape = (segment.rows, qk_slot.row_elements)
            qk = self._device.input(qk_slot, rows.start * qk_slot.row_elements, shape)
            keys, values = qk[:, width:].view(kv_shape), self._values[rows].view(kv_shape)
            self._cache.append(record.target, segment, keys, values)
            # The query heads that share a kv head become rows of one product, so k and v are never expanded.
            query = self._head_major(qk[:, :width]).view(self._kv_heads, -1, self._head_dim)
            keys = self._cache.keys(record.target, segment.sequence, seen)
            products = (self._kv_heads, self._group * segment.rows, seen.columns)
            scores = self._device.output(self._slots[record.out_slot], offset, products)
            _multiply(query, keys, scores)
            offset += scores.numel()

    def context(self, record: Record) -> None:
        self._use_threads(self._tile_threads)
        offset = 0
        for segment, seen in self._tile(record):
            rows = slice(segment.first_row, segment.first_row + segment.rows)
            shape = (self._kv_heads, self._group * segment.rows, seen.columns)
            probabilities = self._device.input(self._slots[record.in_slot], offset, shape)
            values = self._cache.values(record.target, segment.sequence, seen)
            blocks = self._blocks_of(segment.rows)
            _multiply(probabilities, values, blocks.view(self._kv_heads, -1, self._head_dim))
            self._token_major(blocks, self._heads[rows])
            offset += probabilities.numel()
        if record.out_slot != NO_SLOT:
            self._use_threads(self._threads)
            _, _, o = self._attention[record.target]
            o.apply(self._heads[_rows(record)], self._rows_out(record))

    def linear(self, record: Record) -> None:
        self._use_threads(self._threads)
        self._linears[record.target].apply(self._rows_in(record), self._rows_out(record))

    def _tile(self, record: Record) -> list[tuple[Segment, KeyRange]]:
        """The record's segments and the keys that each sees."""
        tile = self._segments[record.first_segment : record.first_segment + record.num_segments]
        return [(segment, key_range(segment, self._windows[record.target])) for segment in tile]

    def _rows_in(self, record: Record) -> torch.Tensor:
        slot = self._slots[record.in_slot]
        return self._device.input(slot, *rows_of(slot, record.first_row, record.rows))

    def _rows_out(self, record: Record) -> torch.Tensor:
        slot = self._slots[record.out_slot]
        return self._device.output(slot, *rows_of(slot, record.first_row, record.rows))

    def _blocks_of(self, rows: int) -> torch.Tensor:
        """Shapes: [H, rows, D]."""
        return self._blocks[: self._num_heads * rows * self._head_dim].view(self._num_heads, rows, self._head_dim)

    def _head_major(self, heads: torch.Tensor) -> torch.Tensor:
        """Shapes: heads [rows, H*D], its rows may lie apart; result [H, rows, D]."""
        blocks = self._blocks_of(heads.shape[0])
        return blocks.copy_(heads.view(-1, self._num_heads, self._head_dim).transpose(0, 1))

    def _token_major(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Shapes: blocks [H, rows, D]; out [rows, H*D]."""
        out.view(-1, self._num_heads, self._head_dim).copy_(blocks.transpose(0, 1))


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Batched; whatever a slot's dtype is, operands are rounded to the cache's."""
    if out.dtype == right.dtype:
        torch.bmm(left.to(right.dtype), right, out=out)
    else:
        out.copy_(torch.bmm(left, right))


def _rows(record: Record) -> slice:
    return slice(record.first_row, record.first_row + record.rows)


def _leave_threads(count: int) -> None:
    """On a device the arithmetic is not of this process's threads."""
