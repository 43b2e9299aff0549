"""The TEE's end of the doorbell: submit now, wait for the completion later."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from tsqp_shm.errors import PeerDied, ProtocolError
from tsqp_shm.shm import layout
from tsqp_shm.shm.doorbell import Doorbell
from tsqp_shm.shm.liveness import PeerWatch
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Outcome, Status, check_completion, pack_submission
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.tiling import Tile
from tsqp_shm.tee.interrupts import raise_held_interrupt
from tsqp_shm.tee.statistics import Statistics

# How long the exit of a GPU process that reported a failure is waited for, to quote its last words.
LAST_WORDS_TIMEOUT_S = 2.0


class _InFlight(NamedTuple):
    """A submission whose completion has not come: this side's own copy, never read back from the arena."""

    sequence: int
    record: bytes
    opcode: Opcode
    lent: tuple[tuple[Slot, int, int], ...]
    submitted_ns: int
    alone: bool


@dataclass(frozen=True)
class _InterruptibleWatch:
    """What is looked at while nothing comes: the peer's life, and Ctrl-C."""

    peer: PeerWatch

    @property
    def heartbeat_age_s(self) -> float | None:
        return self.peer.heartbeat_age_s

    def check(self) -> None:
        raise_held_interrupt()
        self.peer.check()


class SubmissionQueue:
    """Submissions in flight; the GPU process executes and completes them in their order.

    A slot named in a submission is handed over until that submission's completion was waited for.
    """

    def __init__(
        self,
        slots: Slots,
        doorbell: Doorbell,
        watch: PeerWatch,
        epoch: int,
        timeout_s: float,
        statistics: Statistics,
    ) -> None:
        self._slots = slots
        self._doorbell = doorbell
        self._watch = _InterruptibleWatch(watch)
        self._epoch = epoch
        self._timeout_s = timeout_s
        self._statistics = statistics
        self._tiles = {slot.index for slot in slots.plan.score_slots}
        self._submitted = 0
        self._in_flight: deque[_InFlight] = deque()

    def submit(
        self,
        opcode: Opcode,
        *,
        layer: int = 0,
        in_slot: Slot | None = None,
        out_slot: Slot | None = None,
        first_row: int = 0,
        rows: int = 0,
        tile: Tile | None = None,
        tile_bytes: int = 0,
    ) -> int:
        """Hands the slots over and rings.

        Args:
            tile: the segments the operation works on.
            tile_bytes: how much of a score slot they take, for the statistics.

        Returns:
            The sequence number to wait for.

        Raises:
            ProtocolError: the peer has broken the ring.
        """
        if len(self._in_flight) >= layout.RING_DEPTH:
            self.wait(self._in_flight[0].sequence)
        self._submitted += 1
        lent = []
        if in_slot is not None:
            lent.append(self._lend(in_slot, first_row, rows, opcode))
            self._statistics.bytes_to_gpu += tile_bytes if in_slot.index in self._tiles else rows * in_slot.row_bytes
        if out_slot is not None:
            lent.append(self._lend(out_slot, first_row, rows, opcode))
            self._statistics.bytes_to_tee += tile_bytes if out_slot.index in self._tiles else rows * out_slot.row_bytes
        record = pack_submission(
            self._submitted,
            self._epoch,
            opcode,
            layer,
            NO_SLOT if in_slot is None else in_slot.index,
            NO_SLOT if out_slot is None else out_slot.index,
            first_row,
            rows,
            tile.first_segment if tile else 0,
            tile.num_segments if tile else 0,
        )
        self._in_flight.append(
            _InFlight(self._submitted, record, opcode, tuple(lent), time.perf_counter_ns(), not self._in_flight)
        )
        self._doorbell.send(record)
        self._statistics.doorbells += 1
        return self._submitted

    def _lend(self, slot: Slot, first_row: int, rows: int, opcode: Opcode) -> tuple[Slot, int, int]:
        # Which rows of a score slot a tile takes follows from its segments: all of it is handed over.
        extent = (slot, 0, slot.num_rows) if slot.index in self._tiles else (slot, first_row, rows)
        self._slots.lend(*extent, opcode.name)
        return extent

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
            for extent in oldest.lent:
                self._slots.take_back(*extent, oldest.opcode.name)
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
        waiting_since = time.perf_counter_ns()
        slot = oldest.lent[-1][0].name if oldest.lent else ""
        completed = self._doorbell.receive(self._watch, timeout_s, oldest.opcode.name, slot)
        now = time.perf_counter_ns()
        record = check_completion(oldest.record, completed)
        if record.status == Status.FAILED:
            self._raise_death(oldest.opcode)
        if record.status == Status.REJECTED:
            raise ProtocolError("status", "a submission the GPU process accepts", f"{oldest.opcode.name} rejected")
        self._statistics.waiting_ns += now - waiting_since
        tally = self._statistics.gpu[oldest.opcode.name]
        tally.calls += 1
        # UNTRUSTED: a claim; it may not exceed what this side saw pass.
        busy_ns = min(record.busy_ns, now - oldest.submitted_ns)
        tally.total_ns += busy_ns
        if oldest.alone:
            self._statistics.round_trips_ns.append(now - oldest.submitted_ns - busy_ns)
        return record

    def _raise_death(self, opcode: Opcode) -> None:
        """The GPU process said that an operation failed; it is about to end, and its last words say why."""
        deadline = time.monotonic() + LAST_WORDS_TIMEOUT_S
        while time.monotonic() < deadline:
            self._watch.check()
            time.sleep(0.02)
        raise PeerDied("gpu", f"{opcode.name} failed")
