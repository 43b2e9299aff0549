"""What the GPU process computes: one method per opcode, from slot to slot.

Here is the step that a record belongs to; the products themselves are in `products` and, for decode on a CPU device, in
`cpu_decode`.
"""

from __future__ import annotations

import torch

from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu import cpu_decode
from tsqp_shm.gpu.cpu_decode import CpuDecode
from tsqp_shm.gpu.device import TORCH_DTYPES, Device
from tsqp_shm.gpu.kv_cache import KVCache
from tsqp_shm.gpu.products import GemmProducts, Products
from tsqp_shm.gpu.weights import Weights
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import Record, check_rows_in_slot
from tsqp_shm.shm.tiling import KeyRange, Segment, key_range


class Operations:
    """The model's heavy half. Records have passed `SubmissionRules.check` before they come here."""

    def __init__(self, spec: ModelSpec, plan: Plan, weights: Weights, device: Device) -> None:
        limits = plan.geometry
        dtype = TORCH_DTYPES[limits["dtype"]]
        self._embedding = weights.embedding
        self._device = device
        self._windows = spec.windows
        self._tokens_slot, self._hidden_slot = plan.slot("tokens"), plan.slot("hidden")
        self._segments_slot = plan.slot("segments")
        self._max_tile_rows: int = limits["tile_rows"]
        self._cache = KVCache(spec, limits["max_num_seqs"], limits["max_model_len"], dtype, device)
        values = device.zeros((limits["max_batch_tokens"], spec.num_kv_heads * spec.head_dim), dtype)
        heads = device.zeros((limits["max_batch_tokens"], spec.num_heads * spec.head_dim), dtype)
        self._gemm = GemmProducts(spec, plan, weights, device, self._cache, values, heads)
        self._decode = None
        if cpu_decode.is_available(device.torch_device):
            self._decode = CpuDecode(device.slot_rows(), weights, self._cache, values, heads, spec.num_heads)
        self._segments: list[Segment] = []
        self._products: Products = self._gemm

    def embed(self, record: Record) -> None:
        """tokens [T, 1] i32 -> hidden [T, C]; begins a step by reading its segment table."""
        self._segments = self._read_segments(record)
        self._cache.begin_step(self._segments)
        is_decode = all(segment.rows == 1 for segment in self._segments)
        self._products = self._decode if self._decode is not None and is_decode else self._gemm
        hidden = self._hidden_slot
        tokens = self._device.input(self._tokens_slot, record.first_row, (record.rows,))
        out = self._device.output(hidden, record.first_row * hidden.row_elements, (record.rows, hidden.row_elements))
        torch.index_select(self._embedding, 0, tokens, out=out)

    def qkv(self, record: Record) -> None:
        self._products.qkv(record)

    def scores(self, record: Record) -> None:
        self._products.scores(record, self._tile(record))

    def context(self, record: Record) -> None:
        self._products.context(record, self._tile(record))

    def gate_up(self, record: Record) -> None:
        self._products.gate_up(record)

    def down(self, record: Record) -> None:
        self._products.down(record)

    def lm_head(self, record: Record) -> None:
        # Of a prompt's rows only the last is wanted, so this may be few rows where the step was not.
        products: Products = self._decode if self._decode is not None else self._gemm
        products.lm_head(record)

    def _tile(self, record: Record) -> list[tuple[Segment, KeyRange]]:
        """The segments of a record, and the keys each sees.

        Raises:
            ProtocolError: they are not of this step, or have more rows than a score slot holds.
        """
        tile = self._segments[record.first_segment : record.first_segment + record.num_segments]
        if len(tile) != record.num_segments:
            raise ProtocolError("num_segments", f"inside the step's {len(self._segments)}", record.num_segments)
        if sum(segment.rows for segment in tile) > self._max_tile_rows:
            raise ProtocolError("rows of a tile", f"at most {self._max_tile_rows}", sum(s.rows for s in tile))
        window = self._windows[record.layer]
        return [(segment, key_range(segment, window)) for segment in tile]

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
