"""What the GPU process computes: one method per opcode, from slot to slot.

Shapes: T tokens, C hidden, H query heads, G kv heads, D head dim, F feed-forward, V vocabulary, R rows.
"""

from __future__ import annotations

import torch

from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu.device import TORCH_DTYPES, Device
from tsqp_shm.gpu.kv_cache import KVCache
from tsqp_shm.gpu.weights import Linear, Weights
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.plan import Plan, Slot
from tsqp_shm.shm.protocol import NO_SLOT, Record, check_rows_in_slot
from tsqp_shm.shm.tiling import KeyRange, Segment, key_range


class Operations:
    """The model's heavy half. Records have passed `SubmissionRules.check` before they come here."""

    def __init__(self, spec: ModelSpec, plan: Plan, weights: Weights, device: Device) -> None:
        limits = plan.geometry
        dtype = TORCH_DTYPES[limits["dtype"]]
        self._spec = spec
        self._weights = weights
        self._device = device
        self._slots = plan.slots
        self._segments_slot = plan.slot("segments")
        self._max_tile_rows: int = limits["tile_rows"]
        self._group = spec.num_heads // spec.num_kv_heads
        self._q_width = spec.num_heads * spec.head_dim
        self._cache = KVCache(spec, limits["max_num_seqs"], limits["max_model_len"], dtype, device)
        # Private to this side: v of the layer at hand, and the heads' outputs before o_proj.
        tokens = limits["max_batch_tokens"]
        self._values = device.zeros((tokens, spec.num_kv_heads * spec.head_dim), dtype)
        self._heads = device.zeros((tokens, self._q_width), dtype)
        self._segments: list[Segment] = []

    def embed(self, record: Record) -> None:
        """tokens [T, 1] i32 -> hidden [T, C]; begins a step by reading its segment table."""
        self._segments = self._read_segments(record)
        self._cache.begin_step(self._segments)
        tokens = self._rows_in(record)
        torch.index_select(self._weights.embedding, 0, tokens.flatten(), out=self._rows_out(record))

    def qkv(self, record: Record) -> None:
        """x [T, C] -> qk [T, (H+G)*D]; v stays here."""
        layer = self._weights.layers[record.layer]
        x = self._rows_in(record)
        layer.qk.apply(x, self._rows_out(record))
        layer.v.apply(x, self._values[record.first_row : record.first_row + record.rows])

    def scores(self, record: Record) -> None:
        """qk -> scores.N: one dense [H, rows, columns] block per segment; appends k and v to the cache."""
        spec = self._spec
        offset = 0
        for segment in self._tile(record):
            rows = segment.rows
            qk = self._device.input(
                self._slots[record.in_slot],
                segment.first_row * (self._q_width + spec.num_kv_heads * spec.head_dim),
                (rows, self._q_width + spec.num_kv_heads * spec.head_dim),
            )
            keys = qk[:, self._q_width :].view(rows, spec.num_kv_heads, spec.head_dim)
            values = self._values[segment.first_row : segment.first_row + rows]
            self._cache.append(record.layer, segment, keys, values.view(rows, spec.num_kv_heads, spec.head_dim))
            # The query heads that share a kv head become rows of one product, so k is never expanded.
            query = qk[:, : self._q_width].view(rows, spec.num_kv_heads, self._group, spec.head_dim)
            query = query.permute(1, 2, 0, 3).reshape(spec.num_kv_heads, self._group * rows, spec.head_dim)
            seen = self._seen(record, segment)
            shape = (spec.num_kv_heads, self._group * rows, seen.columns)
            scores = self._device.output(self._slots[record.out_slot], offset, shape)
            torch.bmm(query, self._cache.keys(record.layer, segment.sequence, seen), out=scores)
            offset += scores.numel()

    def context(self, record: Record) -> None:
        """scores.N, now probabilities, times v; where an out slot is named, o_proj of all rows -> hidden [T, C]."""
        spec = self._spec
        offset = 0
        for segment in self._tile(record):
            rows = segment.rows
            seen = self._seen(record, segment)
            shape = (spec.num_kv_heads, self._group * rows, seen.columns)
            probabilities = self._device.input(self._slots[record.in_slot], offset, shape)
            heads = torch.bmm(probabilities, self._cache.values(record.layer, segment.sequence, seen))
            heads = heads.view(spec.num_kv_heads, self._group, rows, spec.head_dim).permute(2, 0, 1, 3)
            target = self._heads[segment.first_row : segment.first_row + rows]
            target.view(rows, spec.num_kv_heads, self._group, spec.head_dim).copy_(heads)
            offset += probabilities.numel()
        if record.out_slot != NO_SLOT:
            heads = self._heads[record.first_row : record.first_row + record.rows]
            self._weights.layers[record.layer].o.apply(heads, self._rows_out(record))

    def gate_up(self, record: Record) -> None:
        """x [T, C] -> gate_up [T, 2F]."""
        self._linear(self._weights.layers[record.layer].gate_up, record)

    def down(self, record: Record) -> None:
        """act [T, F] -> hidden [T, C]."""
        self._linear(self._weights.layers[record.layer].down, record)

    def lm_head(self, record: Record) -> None:
        """x [R, C] -> logits [R, V]."""
        self._linear(self._weights.lm_head, record)

    def _linear(self, linear: Linear, record: Record) -> None:
        linear.apply(self._rows_in(record), self._rows_out(record))

    def _rows_in(self, record: Record) -> torch.Tensor:
        slot = self._slots[record.in_slot]
        return self._device.input(slot, *_block(slot, record))

    def _rows_out(self, record: Record) -> torch.Tensor:
        slot = self._slots[record.out_slot]
        return self._device.output(slot, *_block(slot, record))

    def _seen(self, record: Record, segment: Segment) -> KeyRange:
        return key_range(segment, self._spec.windows[record.layer])

    def _tile(self, record: Record) -> list[Segment]:
        """The segments of a record.

        Raises:
            ProtocolError: they are not of this step, or have more rows than a score slot holds.
        """
        tile = self._segments[record.first_segment : record.first_segment + record.num_segments]
        if len(tile) != record.num_segments:
            raise ProtocolError("num_segments", f"inside the step's {len(self._segments)}", record.num_segments)
        if sum(segment.rows for segment in tile) > self._max_tile_rows:
            raise ProtocolError("rows of a tile", f"at most {self._max_tile_rows}", sum(s.rows for s in tile))
        return tile

    def _read_segments(self, record: Record) -> list[Segment]:
        """Copies the step's segment table out of its slot and checks that it covers the rows, one by one."""
        slot = self._segments_slot
        check_rows_in_slot(slot, record.first_segment, record.num_segments)
        table = self._device.input(slot, record.first_segment * 4, (record.num_segments, 4)).tolist()
        segments = [Segment(*row) for row in table]
        next_row = record.first_row
        for segment in segments:
            if min(segment) < 0 or segment.rows < 1 or segment.first_row != next_row:
                raise ProtocolError("segment", f"rows from {next_row} on", tuple(segment))
            next_row += segment.rows
        if next_row != record.first_row + record.rows:
            raise ProtocolError("segment rows", record.rows, next_row - record.first_row)
        return segments


def _block(slot: Slot, record: Record) -> tuple[int, tuple[int, int]]:
    return record.first_row * slot.row_elements, (record.rows, slot.row_elements)
