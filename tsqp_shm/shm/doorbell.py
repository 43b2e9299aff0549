"""The doorbell: how a 64-byte record gets to the other side, and how a side waits for one.

Three ways, one interface. `adaptive`: the ring in the arena, and a waker only to wake a side that sleeps. `zmq`: every
record goes through the waker, which is ZeroMQ where two processes meet. `spin`: the ring alone, never asleep; for
measuring, and for enclaves whose border no socket crosses cheaply.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from tsqp_shm import _native
from tsqp_shm.errors import PeerTimeout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.liveness import LOOK_INTERVAL_S
from tsqp_shm.shm.transport import Waker

LAST_RECORD_LINGER_MS = 500
_SLICE_NS = int(LOOK_INTERVAL_S * 1e9)
_TIMEOUT = 3
_WAIT_PHASES = ("ready", "spun", "yielded")


class Watch(Protocol):
    """Tells while waiting whether the peer lives; see `liveness.PeerWatch`."""

    @property
    def heartbeat_age_s(self) -> float | None: ...
    def check(self) -> None: ...


class Doorbell(ABC):
    """One end. The TEE sends submissions and receives completions; the GPU process does the opposite.

    Attributes:
        waits: how waits ended: "ready", "spun", "yielded", "parked", "message".
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()

    @abstractmethod
    def send(self, record: bytes) -> None:
        """Hands one record over and does not wait for the other side to read it."""

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
                raise PeerTimeout(operation, slot, waited_s, watch.heartbeat_age_s)


class _Rings:
    """Both rings of the arena as one side sees them."""

    def __init__(self, arena: Arena, role: str) -> None:
        outgoing, incoming = ("submission", "completion") if role == "tee" else ("completion", "submission")
        self.writer = _native.RingWriter(arena.buffer, outgoing)
        self.reader = _native.RingReader(arena.buffer, incoming)

    def write(self, record: bytes) -> bool:
        """Publishes a record; True: the other side is parked and has to be rung."""
        return self.writer.write(record)

    def read(self, spin_ns: int, yield_ns: int, waits: Counter[str]) -> bytes | None:
        # UNTRUSTED: a private copy of 64 bytes; `check_completion` and `SubmissionRules` decide what is believed.
        how, record = self.reader.read(spin_ns, yield_ns)
        if how == _TIMEOUT:
            return None
        waits[_WAIT_PHASES[how]] += 1
        return record

    def park(self) -> bool:
        return self.reader.park()

    def release(self) -> None:
        self.writer.release()
        self.reader.release()


class SpinDoorbell(Doorbell):
    """Never sleeps: spins, and after `spin_us` yields the processor between looks."""

    def __init__(self, arena: Arena, role: str, spin_us: int) -> None:
        super().__init__()
        self._rings = _Rings(arena, role)
        self._spin_ns = min(spin_us * 1000, _SLICE_NS)

    def send(self, record: bytes) -> None:
        self._rings.write(record)

    def poll(self) -> bytes | None:
        return self._rings.read(self._spin_ns, _SLICE_NS - self._spin_ns, self.waits)

    def take(self) -> bytes | None:
        return self._rings.read(0, 0, self.waits)

    def close(self) -> None:
        self._rings.release()


class AdaptiveDoorbell(Doorbell):
    """Spins, then yields, then sleeps on the waker, having said so in the arena."""

    def __init__(self, arena: Arena, role: str, spin_us: int, yield_us: int, waker: Waker) -> None:
        super().__init__()
        self._rings = _Rings(arena, role)
        # All of it fits a slice, which is how often the peer's heartbeat is looked at.
        self._spin_ns = min(spin_us * 1000, _SLICE_NS)
        self._yield_ns = min(yield_us * 1000, _SLICE_NS - self._spin_ns)
        self._sleep_ns = _SLICE_NS - self._spin_ns - self._yield_ns
        self._is_quiet = False
        self.waker = waker

    def send(self, record: bytes) -> None:
        if self._rings.write(record):
            # A message that cannot be sent is only a later wake-up: a sleeper looks at the ring by itself too.
            self.waker.try_send(record)

    def nap(self, nap_ns: int) -> bool:
        if not self._yield_ns or self._rings.reader.available():
            return False
        time.sleep(nap_ns / 1e9)
        return True

    def take(self) -> bytes | None:
        return self._rings.read(0, 0, self.waits)

    def poll(self) -> bytes | None:
        # After a sleep that nothing ended, the next record may be long in coming: an idle session only sleeps.
        spin_ns, yield_ns = (0, 0) if self._is_quiet else (self._spin_ns, self._yield_ns)
        self._is_quiet = False
        record = self._rings.read(spin_ns, yield_ns, self.waits)
        if record is not None:
            return record
        # Wake-ups of earlier go first, or they would end this sleep before it began.
        self.waker.discard()
        if self._rings.park():
            try:
                self.waker.wait(self._sleep_ns)
            finally:
                self._rings.reader.unpark()
        record = self._rings.read(0, 0, Counter())
        if record is None:
            self._is_quiet = True
        else:
            self.waits["parked"] += 1
        return record

    def close(self) -> None:
        self.waker.close()
        self._rings.release()


class ZmqDoorbell(Doorbell):
    """Every record goes through the waker; the arena holds slots only."""

    def __init__(self, waker: Waker) -> None:
        super().__init__()
        self.waker = waker
        self._unsent: deque[bytes] = deque()

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

    def _receive(self, timeout_ns: int) -> bytes | None:
        self._flush()
        # UNTRUSTED: any 64 bytes; `check_completion` and `SubmissionRules` decide what is believed.
        record = self.waker.receive(timeout_ns)
        if record is not None:
            self.waits["message"] += 1
        return record

    def close(self) -> None:
        # The last record may say why this side ends, and may be on its way yet.
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
