"""A doorbell that records its rings, its waits phase by phase and, for the GPU process, the operations between them.

It stands around another one and takes two of that one's parts in hand, once: a doorbell that is not traced has no
branch for it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from tsqp_shm.errors import TsqpError
from tsqp_shm.shm.doorbell import AdaptiveDoorbell, Doorbell, Rings, SpinDoorbell, Watch, ZmqDoorbell
from tsqp_shm.shm.transport import Waker
from tsqp_shm.trace.recorder import NO_RECORD, Recorder


class _TracedRings(Rings):
    def __init__(self, rings: Rings, recorder: Recorder) -> None:
        vars(self).update(vars(rings))
        self._recorder = recorder

    def read(self, spin_ns: int, yield_ns: int) -> bytes | None:
        at_once = self.waits["ready"]
        begin_ns = time.perf_counter_ns()
        record = super().read(spin_ns, yield_ns)
        end_ns = time.perf_counter_ns()
        if self.waits["ready"] == at_once and spin_ns + yield_ns:
            # The native wait goes over from the one to the other after spin_ns.
            turn_ns = min(begin_ns + spin_ns, end_ns)
            if spin_ns:
                self._recorder.wait("spin", begin_ns, turn_ns)
            if end_ns > turn_ns:
                self._recorder.wait("yield", turn_ns, end_ns)
        return record


class _TracedWaker:
    """A `Waker` around another one, whose sleeps are recorded."""

    def __init__(self, waker: Waker, recorder: Recorder) -> None:
        self._waker = waker
        self._recorder = recorder

    def try_send(self, record: bytes) -> bool:
        return self._waker.try_send(record)

    def wait(self, timeout_ns: int) -> bool:
        with self._parked(timeout_ns):
            return self._waker.wait(timeout_ns)

    def receive(self, timeout_ns: int) -> bytes | None:
        with self._parked(timeout_ns):
            return self._waker.receive(timeout_ns)

    @contextmanager
    def _parked(self, timeout_ns: int) -> Iterator[None]:
        if not timeout_ns:
            yield
            return
        begin_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self._recorder.wait("park", begin_ns, time.perf_counter_ns())

    def discard(self) -> None:
        self._waker.discard()

    def stranger(self) -> TsqpError | None:
        return self._waker.stranger()

    def close(self, linger_ms: int = 0) -> None:
        self._waker.close(linger_ms)


class _TracedDoorbell(Doorbell):
    def __init__(self, bell: Doorbell, recorder: Recorder) -> None:
        self._bell = bell
        self._recorder = recorder
        if isinstance(bell, (SpinDoorbell, AdaptiveDoorbell)):
            bell._rings = _TracedRings(bell._rings, recorder)
        if isinstance(bell, (AdaptiveDoorbell, ZmqDoorbell)):
            bell.waker = _TracedWaker(bell.waker, recorder)

    @property
    def waits(self) -> Counter[str]:
        return self._bell.waits

    def poll(self) -> bytes | None:
        return self._bell.poll()

    def stranger(self) -> TsqpError | None:
        return self._bell.stranger()

    def take(self) -> bytes | None:
        return self._bell.take()

    def close(self) -> None:
        self._bell.close()


class SubmittingDoorbell(_TracedDoorbell):
    """The TEE's end. What it records of a completion is its own copy of the submission."""

    def __init__(self, bell: Doorbell, recorder: Recorder) -> None:
        super().__init__(bell, recorder)
        self._in_flight: deque[bytes] = deque()

    def send(self, record: bytes) -> None:
        begin_ns = time.perf_counter_ns()
        self._bell.send(record)
        self._recorder.slice("ring", begin_ns, time.perf_counter_ns(), record)
        self._recorder.rung = record
        self._in_flight.append(record)

    def nap(self, nap_ns: int) -> bool:
        begin_ns = time.perf_counter_ns()
        napped = self._bell.nap(nap_ns)
        if napped:
            self._recorder.wait("nap", begin_ns, time.perf_counter_ns())
        return napped

    def receive(self, watch: Watch, timeout_s: float | None, operation: str, slot: str = "") -> bytes:
        begin_ns = time.perf_counter_ns()
        record = self._in_flight[0] if self._in_flight else NO_RECORD
        try:
            completion = self._bell.receive(watch, timeout_s, operation, slot)
            if self._in_flight:
                self._in_flight.popleft()
            return completion
        finally:
            # A wait that ends in an error is what the trace was made for; one that Ctrl-C ends is taken up again.
            self._recorder.wait("wait", begin_ns, time.perf_counter_ns(), record)


class ServingDoorbell(_TracedDoorbell):
    """The GPU process's end. An operation lasts from its submission's arrival to its completion's departure."""

    def __init__(self, bell: Doorbell, recorder: Recorder) -> None:
        super().__init__(bell, recorder)
        self._received: deque[tuple[int, bytes]] = deque()
        self._sent_ns = 0

    def receive(self, watch: Watch, timeout_s: float | None, operation: str, slot: str = "") -> bytes:
        begin_ns = time.perf_counter_ns()
        try:
            submission = self._bell.receive(watch, timeout_s, operation, slot)
        except BaseException:
            self._recorder.wait("wait", begin_ns, time.perf_counter_ns())
            raise
        self._recorder.wait("wait", begin_ns, self._received_now(submission), submission)
        return submission

    def take(self) -> bytes | None:
        submission = self._bell.take()
        if submission is not None:
            self._received_now(submission)
        return submission

    def _received_now(self, submission: bytes) -> int:
        received_ns = time.perf_counter_ns()
        self._received.append((received_ns, submission))
        return received_ns

    def send(self, record: bytes) -> None:
        # Operations are executed in their order: one begins when the one before has ended, or later.
        received_ns, submission = self._received.popleft()
        done_ns = time.perf_counter_ns()
        self._recorder.slice("run", max(received_ns, self._sent_ns), done_ns, submission)
        self._bell.send(record)
        self._sent_ns = time.perf_counter_ns()
        self._recorder.slice("ring", done_ns, self._sent_ns, submission)
