"""`--check-finite`: each result is looked at as it completes, so that the first NaN has a name."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from tsqp_shm import _native
from tsqp_shm.errors import ProtocolError
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.protocol import Opcode, operation_of
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.submission import SubmissionQueue


class _Result(NamedTuple):
    """Which elements of which slot a submission in flight writes."""

    sequence: int
    opcode: Opcode
    target: int
    slot: Slot
    offset_elements: int
    num_elements: int


class FiniteSubmissionQueue(SubmissionQueue):
    """A queue whose results are numbers; without the check there is no branch for it."""

    def __init__(self, slots: Slots, *others: Any) -> None:
        super().__init__(slots, *others)
        self._slots = slots
        self._results: deque[_Result] = deque()

    def submit(self, opcode: Opcode, **request: Any) -> int:
        sequence = super().submit(opcode, **request)
        slot = request.get("out_slot")
        if slot is not None:
            if slot.kind == "tile":
                offset, count = 0, request["tile_bytes"] * slot.row_elements // slot.row_bytes
            else:
                offset, count = request.get("first_row", 0) * slot.row_elements, request["rows"] * slot.row_elements
            self._results.append(_Result(sequence, opcode, request.get("target", 0), slot, offset, count))
        return sequence

    def wait(self, sequence: int) -> None:
        """Raises:
        ProtocolError: naming the first result with a NaN or an infinity.
        """
        # One by one: a later operation may write over what an earlier one has completed.
        while self._results and self._results[0].sequence <= sequence:
            super().wait(self._results[0].sequence)
            self._require_finite(self._results.popleft())
        super().wait(sequence)

    def _require_finite(self, result: _Result) -> None:
        # UNTRUSTED: names the culprit and guards nothing, as the slot may change after it; the sampler does.
        if _native.all_finite(self._slots.table, result.slot.index, result.offset_elements, result.num_elements):
            return
        name, layer = operation_of(result.opcode, result.target, self._slots.plan.linear_operations)
        where = f"result of {name}" if layer is None else f"result of {name} in layer {layer}"
        raise ProtocolError(where, "finite numbers", "NaN or infinity")
