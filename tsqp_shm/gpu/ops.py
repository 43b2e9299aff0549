"""What the GPU process computes: one method per opcode, from slot to slot.

Here is the step that a record belongs to; the products themselves are in `products`, and for a CPU device in
`packed_products`.
"""

from __future__ import annotations

from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu import packed_products
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.packed_products import PackedProducts
from tsqp_shm.gpu.products import GemmProducts, Products
from tsqp_shm.gpu.weights import Weights
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import Record, check_rows_in_slot
from tsqp_shm.shm.tiling import Segment


def make_products(spec: ModelSpec, plan: Plan, weights: Weights, device: Device) -> Products:
    """The fastest products for this device, model and dtype."""
    if packed_products.is_available(spec, plan, device.torch_device):
        return PackedProducts(spec, plan, weights, device)
    return GemmProducts(spec, plan, weights, device)


class Operations:
    """The model's heavy half. Records have passed `SubmissionRules.check` before they come here."""

    def __init__(self, plan: Plan, products: Products, device: Device) -> None:
        self._device = device
        self._segments_slot = plan.slot("segments")
        self._max_tile_rows = plan.limits.tile_rows
        self._segments: list[Segment] = []
        self._products = products
        self.qkv = products.qkv
        self.gate_up = products.gate_up
        self.down = products.down
        self.lm_head = products.lm_head

    def embed(self, record: Record) -> None:
        """tokens [T, 1] i32 -> hidden [T, C]; begins a step by reading its segment table."""
        self._segments = self._read_segments(record)
        self._products.begin_step(self._segments)
        self._products.embed(record)

    def scores(self, record: Record) -> None:
        self._check_tile(record)
        self._products.scores(record)

    def context(self, record: Record) -> None:
        self._check_tile(record)
        self._products.context(record)

    def _check_tile(self, record: Record) -> None:
        """Raises:
        ProtocolError: the record's segments are not of this step, or have more rows than a score slot holds.
        """
        tile = self._segments[record.first_segment : record.first_segment + record.num_segments]
        if len(tile) != record.num_segments:
            raise ProtocolError("num_segments", f"inside the step's {len(self._segments)}", record.num_segments)
        rows = sum(segment.rows for segment in tile)
        if rows > self._max_tile_rows:
            raise ProtocolError("rows of a tile", f"at most {self._max_tile_rows}", rows)

    def _read_segments(self, record: Record) -> list[Segment]:
        """Copies the step's segment table out of its slot and checks that it covers the rows, one by one."""
        slot = self._segments_slot
        check_rows_in_slot(slot, record.first_segment, record.num_segments)
        table = self._device.host(slot, record.first_segment * 4, (record.num_segments, 4)).tolist()
        segments = [Segment(*row) for row in table]
        next_row = record.first_row
        for segment in segments:
            if min(segment) < 0 or segment.rows < 1 or segment.first_row != next_row:
                raise ProtocolError("segment", f"rows from {next_row} on", tuple(segment))
            next_row += segment.rows
        if next_row != record.first_row + record.rows:
            raise ProtocolError("segment rows", record.rows, next_row - record.first_row)
        return segments
