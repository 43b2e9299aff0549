"""The TEE's end of the doorbell: submit now, wait for the completion later.

What is done for every doorbell is native (`native/border/submissions.h`): the record and this side's own copy of it,
the rows that it lends, the ring, the comparison of its completion, what is counted and learnt. Python says what is to
be done, and waits where that takes long.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

from tsqp_shm import _native
from tsqp_shm.errors import PeerDied, PeerTimeout, ProtocolError, TsqpError
from tsqp_shm.shm.doorbell import Doorbell, Watch
from tsqp_shm.shm.liveness import LOOK_INTERVAL_S
from tsqp_shm.shm.plan import Operation, Slot
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Status, check_completion, operation_of
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.tiling import Tile
from tsqp_shm.tee.statistics import Statistics

# How long the exit of a GPU process that reported a failure is waited for, to quote its last words.
LAST_WORDS_TIMEOUT_S = 2.0
# The watch is asked so often while a step lasts, however fast its completions come.
_LOOK_INTERVAL_NS = int(LOOK_INTERVAL_S * 1e9)

_NO_SEGMENTS = Tile(0, 0)


class Outcome(NamedTuple):
    """What a completion adds to its submission: the peer's word, and good for display only."""

    busy_ns: int
    value: int


class _OperationNumbers(dict[int, int]):
    """Native code's number for an operation, by `opcode << 16 | target`; found out when it is first needed."""

    def __init__(self, tallies: _native.Tallies, linears: Sequence[Operation]) -> None:
        self._tallies = tallies
        self._linears = linears

    def __missing__(self, key: int) -> int:
        number = self._tallies.number_of(operation_of(key >> 16, key & 0xFFFF, self._linears).name)
        self[key] = number
        return number


class SubmissionQueue:
    """Submissions in flight; the GPU process executes and completes them in their order.

    A slot named in a submission is handed over until that submission's completion was waited for. One thread at a time.

    Waits are bounded by their sum and not one by one: a peer that answers each operation at the last moment would hold
    a step of hundreds as long as it likes.

    Args:
        watch: asked now and then while a step lasts; what it raises ends the wait.
        timeout_s: how long a step's waits may take, all together.
    """

    def __init__(
        self,
        slots: Slots,
        doorbell: Doorbell,
        watch: Watch,
        epoch: int,
        timeout_s: float,
        statistics: Statistics,
    ) -> None:
        self._plan = slots.plan
        self._doorbell = doorbell
        self._watch = watch
        self._timeout_s = timeout_s
        self._tallies = statistics.submissions
        self._look_ns = 0
        self._operations = _OperationNumbers(statistics.submissions, slots.plan.linear_operations)
        rows = [(slot.num_rows, slot.row_bytes, slot.kind == "tile") for slot in slots.plan.shared_slots]
        rings = doorbell.rings
        if rings is None:
            self._submissions = _native.Submissions(epoch, rows, slots.loans, statistics.submissions, doorbell.send)
        else:
            self._submissions = _native.Submissions(
                epoch, rows, slots.loans, statistics.submissions, rings.wake,
                rings.writer, rings.reader, rings.spin_ns, rings.yield_ns,
            )  # fmt: skip
        self._bound(timeout_s)

    def begin_step(self) -> None:
        """A step begins, when whatever was left in flight has come back: what its waits may take is counted anew."""
        self._bound(self._timeout_s, is_step=True)
        self.drain()

    def _bound(self, limit_s: float, *, is_step: bool = False) -> None:
        self._limit_s, self._is_step = limit_s, is_step
        self._waited_before_ns = self._tallies.waiting_ns
        self._completed_before = self._submissions.completed

    def submit(
        self,
        opcode: Opcode,
        *,
        target: int = 0,
        in_slot: Slot | None = None,
        out_slot: Slot | None = None,
        first_row: int = 0,
        rows: int = 0,
        tile: Tile = _NO_SEGMENTS,
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
        submissions = self._submissions
        # Arguments one by one, as a tuple of them would take as long as the ring's write.
        while not (
            sequence := submissions.submit(
                self._operations[opcode << 16 | target],
                opcode,
                target,
                NO_SLOT if in_slot is None else in_slot.index,
                NO_SLOT if out_slot is None else out_slot.index,
                first_row,
                rows,
                tile.first_segment,
                tile.num_segments,
                tile_bytes,
            )
        ):
            # As many are in flight as the ring holds.
            self.wait(submissions.completed + 1)
        return sequence

    def wait(self, sequence: int) -> None:
        """Waits until a submission and all before it are complete; their slots are this side's again.

        Returns at once if it was waited for before.

        Raises:
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        try:
            while not self._submissions.wait(sequence):
                self._submissions.complete(self._receive())
        except _native.UnexpectedCompletion as unexpected:
            self._raise_refusal(*unexpected.args)

    def drain(self) -> None:
        """Waits for whatever is in flight."""
        self.wait(self._submissions.submitted)

    def take_arrived(self) -> int:
        """Completes what is there already, without waiting, for who breaks off a step.

        Returns:
            The newest sequence number that is complete.
        """
        # Whatever else comes instead of a completion: the step has ended for another reason.
        with suppress(_native.UnexpectedCompletion, TsqpError):
            while self._submissions.completed < self._submissions.submitted:
                record = self._doorbell.take()
                if record is None:
                    break
                self._submissions.complete(record)
        return self._submissions.completed

    def call(self, opcode: Opcode, timeout_s: float | None = None) -> Outcome:
        """Submits an operation without slots and waits for it and for all before it.

        Args:
            timeout_s: how long at most; None: as long as a step.
        """
        self._bound(self._timeout_s if timeout_s is None else timeout_s)
        self.wait(self.submit(opcode))
        return Outcome(*self._submissions.outcome())

    def look(self) -> None:
        """For who computes for long and waits for nothing: asks the watch, where it is time to.

        Raises:
            PeerDied, PeerTimeout, TsqpError: the session is over.
        """
        if time.perf_counter_ns() >= self._look_ns:
            self._look()

    def _look(self) -> None:
        """Asks the watch, and whether the step's waits have taken too long; native code completes on until the next."""
        self._watch.check()
        if self._left_s <= 0:
            raise self._doorbell.stranger() or self._overdue()
        self._look_ns = time.perf_counter_ns() + _LOOK_INTERVAL_NS
        self._submissions.look_at(self._look_ns)

    @property
    def _left_s(self) -> float:
        """Of what may be waited."""
        return self._limit_s - (self._tallies.waiting_ns - self._waited_before_ns) / 1e9

    def _overdue(self) -> PeerTimeout:
        operation, slot_name = self._awaited
        answered = None
        if self._is_step:
            before, submissions = self._completed_before, self._submissions
            answered = submissions.completed - before, submissions.submitted - before
        return PeerTimeout(operation, slot_name, self._limit_s, self._watch.heartbeat_age_s, answered)

    @property
    def _awaited(self) -> tuple[str, str]:
        """The oldest in flight: its operation, and the slot that it concerns or ""."""
        operation, slot = self._submissions.oldest()
        return operation, "" if slot == NO_SLOT else self._plan.slots[slot].name

    def _receive(self) -> bytes:
        """The completion of the oldest submission, where native code has not found it."""
        # The wait begins here, if it has not yet.
        nap_ns = self._submissions.nap_ns()
        if time.perf_counter_ns() >= self._look_ns:
            self._look()
        elif not nap_ns:
            # Native code has spun and yielded in vain.
            self._doorbell.is_quiet = True
        elif self._doorbell.nap(nap_ns):
            self._submissions.napped()
        try:
            return self._doorbell.receive(self._watch, self._left_s, *self._awaited)
        except PeerTimeout:
            raise self._overdue() from None

    def _raise_refusal(self, submitted: bytes, completed: bytes) -> NoReturn:
        status = check_completion(submitted, completed)
        operation, _ = self._submissions.oldest()
        if status == Status.REJECTED:
            raise ProtocolError("status", "a submission the GPU process accepts", f"{operation} rejected")
        # It said that the operation failed; it is about to end, and its last words say why.
        deadline = time.monotonic() + LAST_WORDS_TIMEOUT_S
        while time.monotonic() < deadline:
            self._watch.check()
            time.sleep(0.02)
        raise PeerDied("gpu", f"{operation} failed")
