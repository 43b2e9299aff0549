"""The doorbell: how a 64-byte record gets to the other side, and how a side waits for one.

Three ways, one interface. `adaptive`: the ring in the arena, and ZeroMQ only to wake a side that sleeps. `zmq`: every
record goes through ZeroMQ. `spin`: the ring alone, never asleep; for measuring, and for enclaves whose border no socket
crosses cheaply.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import zmq

from tsqp_shm import _native
from tsqp_shm.errors import ConfigError, PeerTimeout
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.liveness import LOOK_INTERVAL_S
from tsqp_shm.shm.protocol import pack_completion

# The kernel's sockaddr_un holds 108 bytes with the final zero; libzmq refuses more.
MAX_IPC_PATH_BYTES = 107
LAST_RECORD_LINGER_MS = 500
# Of up to 8 KiB each, as libzmq reads them off a connection.
MAX_CHUNKS = 2
# How often the TEE looks whether the GPU process has its socket yet.
RECONNECT_INTERVAL_MS = 20
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

    @abstractmethod
    def close(self) -> None:
        """Lets go of sockets and of the arena."""

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


class Rings:
    """Both rings of the arena as one side sees them.

    Attributes:
        spin_ns, yield_ns: how long a wait for a record spins, and then yields the processor between looks.
        wake: rings the other side, with any record, where a write has found that it is parked.
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


class _Socket:
    """A ZeroMQ STREAM socket: the bytes of one connection. The GPU process binds, the TEE connects.

    Not PAIR: libzmq limits a frame and not a message, and would collect the frames of one that never ends. Of a stream
    it holds MAX_CHUNKS at most; the rest stays with the kernel, which stops the sender. And the TEE listens nowhere:
    whoever connects more often than it has file descriptors makes libzmq abort the process that does.
    """

    def __init__(self, endpoint: str, role: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.STREAM)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, MAX_CHUNKS)
        # What came and was not asked for yet: less than a record and a chunk.
        self._received = b""
        # Routing ids of whoever is connected; the first is the peer, and the others are not heard.
        self._connections: list[bytes] = []
        try:
            require_usable(endpoint, role)
            if role == "gpu":
                self._socket.bind(endpoint)
            else:
                # Known beforehand, so that what is sent before the GPU process is there waits in the socket.
                self._connections.append(b"gpu")
                self._socket.setsockopt(zmq.STREAM_NOTIFY, 0)
                self._socket.setsockopt(zmq.CONNECT_ROUTING_ID, self._connections[0])
                self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_INTERVAL_MS)
                self._socket.connect(endpoint)
        except ConfigError:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError("endpoint", endpoint, f"an address that can be used ({error.strerror})") from error

    def try_send(self, record: bytes) -> bool:
        """Sends without waiting; False: nobody is connected yet, or the queue is full."""
        if not self._connections and self.wait(0):
            self._take()
        if not self._connections:
            return False
        try:
            self._socket.send_multipart([self._connections[0], record], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
            return False
        return True

    def receive(self, timeout_ns: int) -> bytes | None:
        """The next 64 bytes, waiting for them so long at most."""
        if len(self._received) < layout.RECORD_BYTES and self.wait(timeout_ns):
            self._take()
        if len(self._received) < layout.RECORD_BYTES:
            return None
        record, self._received = self._received[: layout.RECORD_BYTES], self._received[layout.RECORD_BYTES :]
        return record

    def wait(self, timeout_ns: int) -> bool:
        """Sleeps until something is there."""
        # Rounded up: a slice that ends before the watch's next look is due would double the time between looks.
        return bool(self._socket.poll(-(-timeout_ns // 1_000_000), zmq.POLLIN))

    def discard(self) -> None:
        """Drops what came: it has done its work by waking this side."""
        # UNTRUSTED: a peer that sends without end must not keep this side here; an honest one has rung less often.
        for _ in range(layout.RING_DEPTH):
            if not self.wait(0):
                return
            self._take()
            self._received = b""

    def _take(self) -> None:
        # UNTRUSTED: a copy of at most a chunk; what it holds is the caller's to check.
        sender, chunk = self._socket.recv_multipart(zmq.NOBLOCK)
        if not chunk:
            self._begin_or_end(sender)
        elif sender == self._connections[0]:
            self._received += chunk

    def _begin_or_end(self, connection: bytes) -> None:
        if connection not in self._connections:
            self._connections.append(connection)
            return
        if connection == self._connections[0]:
            self._received = b""
        self._connections.remove(connection)

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger=linger_ms)
        self._context.term()


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
    """Spins, then yields, then sleeps on the socket, having said so in the arena."""

    def __init__(self, arena: Arena, role: str, spin_us: int, yield_us: int, socket: _Socket) -> None:
        # All of it fits a slice, which is how often the peer's heartbeat is looked at.
        spin_ns = min(spin_us * 1000, _SLICE_NS)
        yield_ns = min(yield_us * 1000, _SLICE_NS - spin_ns)
        # A message that cannot be sent is only a later wake-up: a sleeper looks at the ring by itself too.
        super().__init__(Rings(arena, role, spin_ns, yield_ns, socket.try_send))
        self._sleep_ns = _SLICE_NS - spin_ns - yield_ns
        self._socket = socket

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
        self._socket.discard()
        if self._rings.park():
            try:
                self._socket.wait(self._sleep_ns)
            finally:
                self._rings.reader.unpark()
        record = self._rings.read_parked()
        self.is_quiet = record is None
        return record

    def close(self) -> None:
        self._socket.close()
        super().close()


class ZmqDoorbell(Doorbell):
    """Every record goes through the socket; the arena holds slots only."""

    def __init__(self, socket: _Socket) -> None:
        self._waits: Counter[str] = Counter()
        self._socket = socket
        self._unsent: deque[bytes] = deque()

    @property
    def waits(self) -> Counter[str]:
        return self._waits.copy()

    def send(self, record: bytes) -> None:
        self._unsent.append(record)
        self._flush()

    def _flush(self) -> None:
        # What is sent before the peer has connected waits here, so that either side may start first.
        while self._unsent and self._socket.try_send(self._unsent[0]):
            self._unsent.popleft()

    def poll(self) -> bytes | None:
        return self._receive(_SLICE_NS)

    def take(self) -> bytes | None:
        return self._receive(0)

    def _receive(self, timeout_ns: int) -> bytes | None:
        self._flush()
        # UNTRUSTED: any 64 bytes; `Submissions` and `SubmissionRules` decide what is believed.
        record = self._socket.receive(timeout_ns)
        if record is not None:
            self._waits["message"] += 1
        return record

    def close(self) -> None:
        # The last record may say why this side ends, and libzmq sends it in a thread of its own.
        self._socket.close(LAST_RECORD_LINGER_MS)


def require_usable(endpoint: str, role: str) -> None:
    """What libzmq would not say: the TEE's would try without end, the GPU process's unlinks what lies at the path.

    Raises:
        ConfigError: no socket can be made at the path, or somebody else has one there.
    """
    path = Path(endpoint.removeprefix("ipc://"))
    if not endpoint.startswith("ipc://"):
        return
    if not path.parent.is_dir():
        raise ConfigError("endpoint", endpoint, "a path in a folder that exists")
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError("endpoint", endpoint, "a path that does not exist yet; there is a file that is no socket")
    if role == "gpu":
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise ConfigError("endpoint", endpoint, "a path that no live session uses")


def open_doorbell(mode: str, arena: Arena, role: str, endpoint: str, spin_us: int, yield_us: int) -> Doorbell:
    """Opens this side's end.

    Args:
        mode: "adaptive", "zmq" or "spin".
        role: "tee" or "gpu".
        endpoint: `ipc://PATH` or `tcp://127.0.0.1:PORT`; unused by "spin".

    Raises:
        ConfigError: the endpoint cannot be used.
    """
    if mode == "spin":
        return SpinDoorbell(arena, role, spin_us)
    path = endpoint.removeprefix("ipc://")
    if path != endpoint and len(path.encode()) > MAX_IPC_PATH_BYTES:
        shorter = f"at most {MAX_IPC_PATH_BYTES} bytes after ipc://; set TSQP_SHM_RUNTIME_DIR to a shorter path"
        raise ConfigError("endpoint", endpoint, shorter)
    socket = _Socket(endpoint, role)
    if mode == "zmq":
        return ZmqDoorbell(socket)
    return AdaptiveDoorbell(arena, role, spin_us, yield_us, socket)
