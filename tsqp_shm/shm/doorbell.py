"""The doorbell: how a 64-byte record gets to the other side, and how a side waits for one.

Three ways, one interface. `adaptive`: the ring in the arena, and a waker only to wake a side that sleeps. `zmq`: every
record goes through the waker, which is ZeroMQ where two processes meet. `spin`: the ring alone, never asleep; for
measuring, and for enclaves whose border no socket crosses cheaply.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from tsqp_shm import _native
from tsqp_shm.errors import PeerTimeout, TsqpError
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.liveness import LOOK_INTERVAL_S
from tsqp_shm.shm.protocol import pack_completion
from tsqp_shm.shm.transport import Waker

LAST_RECORD_LINGER_MS = 500
# What wakes a side that sleeps on the waker: as long as a record, and none, for the record lies in the ring.
WAKE_UP = bytes(layout.RECORD_BYTES)
_CLOSING_SLICE_NS = 5_000_000
_SLICE_NS = int(LOOK_INTERVAL_S * 1e9)


class Watch(Protocol):
    """Tells while waiting whether the peer lives; see `liveness.PeerWatch`."""

    @property
    def heartbeat_age_s(self) -> float | None: ...
    def check(self) -> None: ...


class Doorbell(ABC):
    """One end. The TEE sends submissions and receives completions; the GPU process does the opposite.

    Attributes:
        is_quiet: nothing came when it was looked for last, so the next record may be long in coming: where waiting ends
            in sleep, the next wait begins with it.
    """

    is_quiet = False

    @property
    @abstractmethod
    def waits(self) -> Counter[str]:
        """How waits have ended: "ready", "spun", "yielded", "parked", "message"."""

    @property
    def rings(self) -> Rings | None:
        """For native code that writes and reads them by itself; None: every record passes by `send` and `receive`."""
        return None

    @abstractmethod
    def send(self, record: bytes) -> None:
        """Hands one record over and does not wait for the other side to read it."""

    def complete(self, submission: bytes, status: int, busy_ns: int = 0, value: int = 0) -> None:
        """Hands the completion of a submission over; see `protocol.pack_completion`."""
        self.send(pack_completion(submission, status, busy_ns, value))

    @abstractmethod
    def poll(self) -> bytes | None:
        """The next record, waiting for it a fraction of a second at most."""

    @abstractmethod
    def take(self) -> bytes | None:
        """The next record if it is there, without waiting."""

    def nap(self, nap_ns: int) -> bool:
        """Leaves the core to others for so long, as nothing is expected; not where a record is there already, or where
        waiting is a matter of spinning or of sleeping alone.

        Returns:
            Whether it did.
        """
        return False

    def stranger(self) -> TsqpError | None:
        """Where the waker has reached somebody who has not proved to be of the session: the error that says so."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Lets go of the waker and of the arena."""

    def receive(self, watch: Watch, timeout_s: float | None, operation: str, slot: str = "") -> bytes:
        """The next record.

        Args:
            watch: asked now and then whether the peer lives.
            timeout_s: None waits as long as the peer lives.
            operation: what is waited for, for the error.
            slot: the slot it concerns, for the error.

        Raises:
            PeerDied: the watch says so.
            PeerTimeout: the peer lives but nothing came.
            ConfigError: nothing came, and somebody else is at the waker's other end.
            ProtocolError: the peer wrote what it must not.
        """
        record = self.poll()
        if record is not None:
            return record
        started = time.monotonic()
        while True:
            watch.check()
            record = self.poll()
            if record is not None:
                return record
            waited_s = time.monotonic() - started
            if timeout_s is not None and waited_s > timeout_s:
                raise self.stranger() or PeerTimeout(operation, slot, waited_s, watch.heartbeat_age_s)


class Rings:
    """Both rings of the arena as one side sees them.

    Attributes:
        spin_ns, yield_ns: how long a wait for a record spins, and then yields the processor between looks.
        wake: rings the other side where a write has found that it is parked; given the record that was written.
    """

    def __init__(self, arena: Arena, role: str, spin_ns: int, yield_ns: int, wake: Callable[[bytes], object]) -> None:
        outgoing, incoming = ("submission", "completion") if role == "tee" else ("completion", "submission")
        self.writer = _native.RingWriter(arena.buffer, outgoing)
        self.reader = _native.RingReader(arena.buffer, incoming)
        self.spin_ns, self.yield_ns, self.wake = spin_ns, yield_ns, wake

    def read(self, spin_ns: int, yield_ns: int) -> bytes | None:
        # UNTRUSTED: a private copy of 64 bytes; `Submissions` and `SubmissionRules` decide what is believed.
        return self.reader.read(spin_ns, yield_ns)

    def read_parked(self) -> bytes | None:
        """The record that has ended a sleep, or kept this side from it."""
        # UNTRUSTED: as in `read`.
        return self.reader.read_parked()

    def park(self) -> bool:
        return self.reader.park()

    @property
    def waits(self) -> Counter[str]:
        return +Counter(self.reader.waits())

    def release(self) -> None:
        self.writer.release()
        self.reader.release()


class _RingDoorbell(Doorbell):
    """Records pass through the rings."""

    def __init__(self, rings: Rings) -> None:
        self._rings = rings

    @property
    def rings(self) -> Rings:
        return self._rings

    @property
    def waits(self) -> Counter[str]:
        return self._rings.waits

    def send(self, record: bytes) -> None:
        if self._rings.writer.write(record):
            self._rings.wake(record)

    def complete(self, submission: bytes, status: int, busy_ns: int = 0, value: int = 0) -> None:
        if self._rings.writer.complete(submission, status, busy_ns, value):
            self._rings.wake(submission)

    def take(self) -> bytes | None:
        return self._rings.read(0, 0)

    def close(self) -> None:
        self._rings.release()


class SpinDoorbell(_RingDoorbell):
    """Never sleeps: spins, and after `spin_us` yields the processor between looks."""

    def __init__(self, arena: Arena, role: str, spin_us: int) -> None:
        spin_ns = min(spin_us * 1000, _SLICE_NS)
        super().__init__(Rings(arena, role, spin_ns, _SLICE_NS - spin_ns, lambda record: None))

    def poll(self) -> bytes | None:
        return self._rings.read(self._rings.spin_ns, self._rings.yield_ns)


class AdaptiveDoorbell(_RingDoorbell):
    """Spins, then yields, then sleeps on the waker, having said so in the arena."""

    def __init__(self, arena: Arena, role: str, spin_us: int, yield_us: int, waker: Waker) -> None:
        # All of it fits a slice, which is how often the peer's heartbeat is looked at.
        spin_ns = min(spin_us * 1000, _SLICE_NS)
        yield_ns = min(yield_us * 1000, _SLICE_NS - spin_ns)
        # A message that cannot be sent is only a later wake-up: a sleeper looks at the ring by itself too.
        super().__init__(Rings(arena, role, spin_ns, yield_ns, lambda record: waker.try_send(WAKE_UP)))
        self._sleep_ns = _SLICE_NS - spin_ns - yield_ns
        self.waker = waker

    def nap(self, nap_ns: int) -> bool:
        if not self._rings.yield_ns or self._rings.reader.available():
            return False
        time.sleep(nap_ns / 1e9)
        return True

    def poll(self) -> bytes | None:
        # After a sleep that nothing ended, the next record may be long in coming: an idle session only sleeps.
        spin_ns, yield_ns = (0, 0) if self.is_quiet else (self._rings.spin_ns, self._rings.yield_ns)
        self.is_quiet = False
        record = self._rings.read(spin_ns, yield_ns)
        if record is not None:
            return record
        # Wake-ups of earlier go first, or they would end this sleep before it began.
        self.waker.discard()
        if self._rings.park():
            try:
                self.waker.wait(self._sleep_ns)
            finally:
                self._rings.reader.unpark()
        record = self._rings.read_parked()
        self.is_quiet = record is None
        return record

    def stranger(self) -> TsqpError | None:
        return self.waker.stranger()

    def close(self) -> None:
        self.waker.close()
        super().close()


class ZmqDoorbell(Doorbell):
    """Every record goes through the waker; the arena holds slots only."""

    def __init__(self, waker: Waker) -> None:
        self._waits: Counter[str] = Counter()
        self.waker = waker
        self._unsent: deque[bytes] = deque()

    @property
    def waits(self) -> Counter[str]:
        return self._waits.copy()

    def send(self, record: bytes) -> None:
        self._unsent.append(record)
        self._flush()

    def _flush(self) -> None:
        # What is sent before the peer has connected waits here, so that either side may start first.
        while self._unsent and self.waker.try_send(self._unsent[0]):
            self._unsent.popleft()

    def poll(self) -> bytes | None:
        return self._receive(_SLICE_NS)

    def take(self) -> bytes | None:
        return self._receive(0)

    def receive(self, watch: Watch, timeout_s: float | None, operation: str, slot: str = "") -> bytes:
        # Else a side whose queue is never empty would not learn that its peer is dead, or that it is to stop.
        if self._waits["message"] % layout.RING_DEPTH == 0:
            watch.check()
        return super().receive(watch, timeout_s, operation, slot)

    def stranger(self) -> TsqpError | None:
        return self.waker.stranger()

    def _receive(self, timeout_ns: int) -> bytes | None:
        self._flush()
        # UNTRUSTED: any 64 bytes; `Submissions` and `SubmissionRules` decide what is believed.
        record = self.waker.receive(timeout_ns)
        if record is not None:
            self._waits["message"] += 1
        return record

    def close(self) -> None:
        # The last record may say why this side ends, and may be on its way yet.
        deadline = time.monotonic() + LAST_RECORD_LINGER_MS / 1000
        with contextlib.suppress(TsqpError):
            self._flush()
            while self._unsent and time.monotonic() < deadline:
                # UNTRUSTED: what comes is dropped; the ends may have to meet first.
                self.waker.receive(_CLOSING_SLICE_NS)
                self._flush()
        self.waker.close(LAST_RECORD_LINGER_MS)


def open_doorbell(
    mode: str, arena: Arena, role: str, open_waker: Callable[[], Waker], spin_us: int, yield_us: int
) -> Doorbell:
    """Opens this side's end.

    Args:
        mode: "adaptive", "zmq" or "spin".
        role: "tee" or "gpu".
        open_waker: called where the mode wants one: not for "spin".

    Raises:
        ConfigError: the waker's endpoint cannot be used.
    """
    if mode == "spin":
        return SpinDoorbell(arena, role, spin_us)
    if mode == "zmq":
        return ZmqDoorbell(open_waker())
    return AdaptiveDoorbell(arena, role, spin_us, yield_us, open_waker())
