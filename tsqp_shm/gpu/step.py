"""The step that a record belongs to: its segments, read once from their slot, and the tiles that are cut of them."""

from __future__ import annotations

from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu.device import Device
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import Opcode, Record, check_rows_in_slot
from tsqp_shm.shm.tiling import Segment


class Step:
    """Records have passed `SubmissionRules.check` before they come here."""

    def __init__(self, plan: Plan, device: Device) -> None:
        self._device = device
        self._segments_slot = plan.slot("segments")
        # Of each score slot, by its index.
        self._max_tile_rows = {
            slot.index: slot.num_rows // plan.geometry.num_heads for slot in plan.slots if slot.kind == "tile"
        }
        self._segments: list[Segment] = []

    def begin(self, record: Record) -> list[Segment]:
        """Copies the step's segment table out of its slot and checks that it covers the record's rows, one by one.

        Raises:
            ProtocolError: it does not.
        """
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
        self._segments = segments
        return segments

    def check_tile(self, record: Record) -> None:
        """Raises:
        ProtocolError: the record's segments are not of this step, or have more rows than a score slot holds.
        """
        tile = self._segments[record.first_segment : record.first_segment + record.num_segments]
        if len(tile) != record.num_segments:
            raise ProtocolError("num_segments", f"inside the step's {len(self._segments)}", record.num_segments)
        rows = sum(segment.rows for segment in tile)
        # The one that it writes or reads.
        most = self._max_tile_rows[record.out_slot if record.opcode == Opcode.SCORES else record.in_slot]
        if rows > most:
            raise ProtocolError("rows of a tile", f"at most {most}", rows)
