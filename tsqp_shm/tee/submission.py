"""The TEE's end of the doorbell: submit now, wait for the completion later."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple, NoReturn

from tsqp_shm import _native
from tsqp_shm.errors import PeerDied, ProtocolError
from tsqp_shm.shm import layout
from tsqp_shm.shm.doorbell import Doorbell, Watch
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.protocol import (
    NO_SLOT,
    Opcode,
    Outcome,
    Record,
    Status,
    check_completion,
    operation_of,
    pack_submission,
)
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.tiling import Tile
from tsqp_shm.tee.service_times import ServiceTimes
from tsqp_shm.tee.statistics import Statistics

# How long the exit of a GPU process that reported a failure is waited for, to quote its last words.
LAST_WORDS_TIMEOUT_S = 2.0
# An enum's own `name` takes as long as the ring's write.
_NAMES = {opcode: opcode.name for opcode in Opcode}


class _InFlight(NamedTuple):
    """A submission whose completion has not come: this side's own copy, never read back from the arena."""

    sequence: int
    record: bytes
    operation: str
    in_slot: Slot | None
    out_slot: Slot | None
    size_bytes: int
    submitted_ns: int
    alone: bool
    # With check_finite: slot, first element and elements that the operation writes.
    result: tuple[Slot, int, int] | None


class SubmissionQueue:
    """Submissions in flight; the GPU process executes and completes them in their order.

    A slot named in a submission is handed over until that submission's completion was waited for.
    """

    def __init__(
        self,
        slots: Slots,
        doorbell: Doorbell,
        watch: Watch,
        epoch: int,
        timeout_s: float,
        statistics: Statistics,
        check_finite: bool = False,
    ) -> None:
        self._slots = slots
        self._doorbell = doorbell
        self._watch = watch
        self._epoch = epoch
        self._timeout_s = timeout_s
        self._statistics = statistics
        self._linears = slots.plan.linear_operations
        self._tiles = {slot.index for slot in slots.plan.score_slots}
        self._check_finite = check_finite
        self._service_times = ServiceTimes()
        self._submitted = 0
        self._in_flight: deque[_InFlight] = deque()

    def submit(
        self,
        opcode: Opcode,
        *,
        target: int = 0,
        in_slot: Slot | None = None,
        out_slot: Slot | None = None,
        first_row: int = 0,
        rows: int = 0,
        tile: Tile | None = None,
        tile_bytes: int = 0,
    ) -> int:
        """Hands the slots over and rings.

        Args:
            target: the layer; of LINEAR the index of the Linear.
            tile: the segments the operation works on.
            tile_bytes: how much of a score slot they take.

        Returns:
            The sequence number to wait for.

        Raises:
            ProtocolError: the peer has broken the ring.
        """
        if len(self._in_flight) >= layout.RING_DEPTH:
            self.wait(self._in_flight[0].sequence)
        self._submitted = sequence = self._submitted + 1
        record = pack_submission(
            sequence,
            self._epoch,
            opcode,
            target,
            NO_SLOT if in_slot is None else in_slot.index,
            NO_SLOT if out_slot is None else out_slot.index,
            first_row,
            rows,
            tile.first_segment if tile else 0,
            tile.num_segments if tile else 0,
        )
        alone, submitted_ns = not self._in_flight, time.perf_counter_ns()
        # Rung first: what is written down here, it is while the peer reads the record.
        self._doorbell.send(record)
        operation = self._linears[target].name if opcode == Opcode.LINEAR else _NAMES[opcode]
        statistics = self._statistics
        to_gpu = to_tee = 0
        if in_slot is not None:
            to_gpu = self._lend(in_slot, first_row, rows, tile_bytes, operation)
            statistics.bytes_to_gpu += to_gpu
        if out_slot is not None:
            to_tee = self._lend(out_slot, first_row, rows, tile_bytes, operation)
            statistics.bytes_to_tee += to_tee
        result = None
        if self._check_finite and out_slot is not None:
            result = self._result(out_slot, first_row, rows, tile_bytes)
        self._in_flight.append(
            _InFlight(sequence, record, operation, in_slot, out_slot, to_gpu + to_tee, submitted_ns, alone, result)
        )
        statistics.doorbells += 1
        return sequence

    def _lend(self, slot: Slot, first_row: int, rows: int, tile_bytes: int, operation: str) -> int:
        """Notes that rows are the peer's. Returns how many bytes it is given."""
        # Which rows of a score slot a tile takes follows from its segments: all of it is handed over.
        if slot.index in self._tiles:
            self._slots.lend(slot, 0, slot.num_rows, operation)
            return tile_bytes
        self._slots.lend(slot, first_row, rows, operation)
        return rows * slot.row_bytes

    def _result(self, slot: Slot, first_row: int, rows: int, tile_bytes: int) -> tuple[Slot, int, int]:
        if slot.index in self._tiles:
            return slot, 0, tile_bytes * slot.row_elements // slot.row_bytes
        return slot, first_row * slot.row_elements, rows * slot.row_elements

    def wait(self, sequence: int, timeout_s: float | None = None) -> Outcome:
        """Waits until a submission and all before it are complete; their slots are this side's again.

        Returns:
            What its completion adds; `busy_ns` and `value` are the peer's word and good for display only.

        Raises:
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        while True:
            oldest = self._in_flight[0]
            record = self._receive(oldest, self._timeout_s if timeout_s is None else timeout_s)
            self._in_flight.popleft()
            if oldest.in_slot is not None:
                self._slots.take_back(oldest.in_slot)
            if oldest.out_slot is not None:
                self._slots.take_back(oldest.out_slot)
            if oldest.result is not None:
                self._require_finite(oldest, *oldest.result)
            if oldest.sequence == sequence:
                return record

    def drain(self) -> None:
        """Waits for whatever an interrupted forward pass left in flight."""
        if self._in_flight:
            self.wait(self._in_flight[-1].sequence)

    def call(self, opcode: Opcode, timeout_s: float | None = None) -> Outcome:
        """Submits an operation without slots and waits for it and for all before it."""
        return self.wait(self.submit(opcode), timeout_s)

    def _receive(self, oldest: _InFlight, timeout_s: float) -> Outcome:
        operation, statistics = oldest.operation, self._statistics
        slot = oldest.out_slot or oldest.in_slot
        waiting_since_ns = time.perf_counter_ns()
        size_bytes, submitted_ns = oldest.size_bytes, oldest.submitted_ns
        looked_ns = waiting_since_ns
        nap_ns = self._service_times.nap_ns(operation, size_bytes, submitted_ns, waiting_since_ns)
        napped = nap_ns > 0 and self._doorbell.nap(nap_ns)
        if napped:
            looked_ns = time.perf_counter_ns()
        completed = self._doorbell.receive(self._watch, timeout_s, operation, slot.name if slot else "")
        now_ns = time.perf_counter_ns()
        self._service_times.completed(operation, size_bytes, submitted_ns, napped, looked_ns, now_ns)
        outcome = check_completion(oldest.record, completed)
        if outcome.status:
            self._raise_refusal(outcome.status, operation)
        statistics.waiting_ns += now_ns - waiting_since_ns
        since_submitted_ns = now_ns - submitted_ns
        # UNTRUSTED: a claim; it may not exceed what this side saw pass.
        busy_ns = outcome.busy_ns if outcome.busy_ns < since_submitted_ns else since_submitted_ns
        tally = statistics.gpu[operation]
        tally.calls += 1
        tally.total_ns += busy_ns
        if oldest.alone:
            statistics.round_trips_ns.append(since_submitted_ns - busy_ns)
        return outcome

    def _require_finite(self, completed: _InFlight, slot: Slot, offset_elements: int, num_elements: int) -> None:
        # UNTRUSTED: names the culprit and guards nothing, as the slot may change after it; the sampler does.
        if _native.all_finite(self._slots.table, slot.index, offset_elements, num_elements):
            return
        where = f"result of {completed.operation}"
        record = Record.unpack(completed.record)
        layer = operation_of(record.opcode, record.target, self._linears).layer
        if layer is not None:
            where += f" in layer {layer}"
        raise ProtocolError(where, "finite numbers", "NaN or infinity")

    def _raise_refusal(self, status: int, operation: str) -> NoReturn:
        if status == Status.REJECTED:
            raise ProtocolError("status", "a submission the GPU process accepts", f"{operation} rejected")
        # It said that the operation failed; it is about to end, and its last words say why.
        deadline = time.monotonic() + LAST_WORDS_TIMEOUT_S
        while time.monotonic() < deadline:
            self._watch.check()
            time.sleep(0.02)
        raise PeerDied("gpu", f"{operation} failed")
