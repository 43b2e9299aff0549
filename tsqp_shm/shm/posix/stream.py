"""The waker over ZeroMQ: the bytes of one connection at an `ipc://` or `tcp://` address of this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import zmq

from tsqp_shm.config import require_endpoint
from tsqp_shm.errors import ConfigError
from tsqp_shm.files import replaceable_part
from tsqp_shm.shm import layout
from tsqp_shm.shm.posix.handshake import Handshake, tcp_ends
from tsqp_shm.shm.record_stream import RecordStream

IPC = "ipc://"
# The kernel's sockaddr_un holds 108 bytes with the final zero; libzmq refuses more.
MAX_IPC_PATH_BYTES = 107
# Of up to 8 KiB each, as libzmq reads them off a connection. As many as an honest peer has records on their way, and
# two: a libzmq that has stopped reading drops the rest of a connection whose other end closes, the last word included.
MAX_CHUNKS = layout.RING_DEPTH + 2
# How often the TEE looks whether the GPU process has its socket yet.
RECONNECT_INTERVAL_MS = 20
# Connections of the TEE over which nothing was proved. One to a port of this machine that nobody listens at may, by
# chance, be made with itself, once in some thousand attempts, and a GPU process may be killed before it has answered:
# whoever echoes or hangs up more often is no accident.
MAX_VAIN = 3
# Connections of the GPU process that have not proved themselves; one more, and the oldest of them is dropped.
MAX_STRANGERS = 16


class ZmqStream(RecordStream):
    """A ZeroMQ STREAM socket: the bytes of one connection. The GPU process binds, the TEE connects.

    Whoever is at the other end counts for nothing until it has proved to be of this session (`handshake`), and nothing
    but that proof is said to it before.

    Not PAIR: libzmq limits a frame and not a message, and would collect the frames of one that never ends. Of a stream
    it holds MAX_CHUNKS at most; the rest stays with the kernel, which stops the sender. And the TEE listens nowhere:
    whoever connects more often than it has file descriptors makes libzmq abort the process that does.
    """

    def __init__(self, endpoint: str, role: str, secret: bytes) -> None:
        """Opens an end, "tee" or "gpu".

        Args:
            secret: of the session.

        Raises:
            ConfigError: no socket can be made at the endpoint, or somebody else has one there.
        """
        super().__init__()
        self._endpoint = endpoint
        self._is_ipc = endpoint.startswith(IPC)
        self._role = role
        self._secret = secret
        # By routing id: the peer, which has proved itself, and those that have not, the oldest first.
        self._peer: bytes | None = None
        self._strangers: dict[bytes, Handshake] = {}
        self._dials = 0
        self._vain = 0
        self._has_met = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.STREAM)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, MAX_CHUNKS)
        try:
            require_usable(endpoint, role)
            if role == "gpu":
                self._bind()
            else:
                self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_INTERVAL_MS)
                self._dial()
        except ConfigError:
            self.close()
            raise
        except (zmq.ZMQError, OSError) as error:
            self.close()
            raise ConfigError("endpoint", endpoint, f"an address that can be used ({error.strerror})") from error

    def _bind(self) -> None:
        self._socket.bind(self._endpoint)
        if self._is_ipc:
            # Whatever the umask is, no other user is to connect.
            Path(self._endpoint.removeprefix(IPC)).chmod(0o600)

    def _dial(self) -> None:
        # Under a new name each time: what waits in the socket for one connection must not reach the next.
        self._dials += 1
        self._socket.setsockopt(zmq.CONNECT_ROUTING_ID, self._dialled)
        self._socket.connect(self._endpoint)

    @property
    def _dialled(self) -> bytes:
        return b"gpu%d" % self._dials

    def try_send(self, record: bytes) -> bool:
        """Sends without waiting; False: the peer has not proved itself yet, or the queue is full."""
        return self.is_connected() and self._peer is not None and self._send(self._peer, record)

    def _send(self, connection: bytes, data: bytes) -> bool:
        try:
            self._socket.send_multipart([connection, data], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
            return False
        return True

    def is_connected(self) -> bool:
        """Whether the peer is, and has proved itself."""
        # No more at a time than an honest peer says: strangers that talk without end must not keep this side here.
        for _ in range(MAX_STRANGERS):
            if self._peer is not None or not self._poll(0):
                break
            self._take()
        return self._peer is not None

    def stranger(self) -> ConfigError | None:
        """Where the TEE has reached somebody that has not proved itself, or hangs up: the error that says so."""
        # Whoever hangs up after the peer was met is the peer: its silence is the error then.
        hangs_up = self._vain > MAX_VAIN and not self._has_met
        if self._role == "gpu" or self._peer is not None or not (self._strangers or hangs_up):
            return None
        expected = "an address at which this session's GPU process answers; whoever does has not proved to be of it"
        return ConfigError("endpoint", self._endpoint, expected)

    def wait(self, timeout_ns: int) -> bool:
        """Sleeps until something is there. What comes before the peer has proved itself only ends the sleep."""
        # Rounded up: a slice that ends before the watch's next look is due would double the time between looks.
        is_there = self._poll(-(-timeout_ns // 1_000_000))
        if not is_there or self._peer is not None:
            return is_there
        self._take()
        return self.is_connected() and self._poll(0)

    def _poll(self, timeout_ms: int) -> bool:
        return bool(self._socket.poll(timeout_ms, zmq.POLLIN))

    def _take(self) -> None:
        # UNTRUSTED: a copy of at most a chunk; what it holds is the caller's to check, once its sender is proven.
        if self._peer is not None:
            sender, chunk = self._socket.recv_multipart(zmq.NOBLOCK)
        else:
            # As a frame, which knows the connection that it came from.
            first, frame = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            sender, chunk = first.bytes, frame.bytes
        if sender == self._peer:
            if chunk:
                self._received += chunk
            else:
                self._peer, self._received = None, b""
                self._part()
        elif sender not in self._strangers:
            # Of one that was dropped, bytes may still be on their way.
            if not chunk and self._peer is None:
                self._meet(sender, frame)
            elif not chunk:
                self._drop(sender)
        elif chunk:
            self._hear(sender, self._strangers[sender], chunk)
        else:
            self._hang_up(sender)

    def _meet(self, connection: bytes, first: zmq.Frame) -> None:
        if self._role == "tee" and connection != self._dialled:
            return
        try:
            # SAFETY: a connection that has ended leaves its descriptor, and its place in libzmq, to another. The notice
            # of its end comes before anything of that other one, and takes with it what was begun with these ends.
            ends = b"" if self._is_ipc else tcp_ends(first.get(zmq.SRCFD), self._role)
        except (zmq.ZMQError, OSError):
            self._hang_up(connection)
            return
        if len(self._strangers) == MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            self._drop(oldest)
        handshake = self._strangers[connection] = Handshake(self._secret, self._role, ends)
        self._send(connection, handshake.hello)

    def _hear(self, connection: bytes, handshake: Handshake, chunk: bytes) -> None:
        """Raises:
        ConfigError: the TEE has reached somebody else's socket.
        """
        reply = handshake.push(chunk)
        if reply:
            self._send(connection, reply)
        if handshake.is_refused:
            error = self.stranger()
            if error is not None and (not handshake.is_echo or self._vain >= MAX_VAIN):
                raise error
            self._hang_up(connection)
        elif handshake.is_proven:
            self._has_met = True
            self._peer, self._received = connection, handshake.rest
            for other in self._strangers:
                if other != connection:
                    self._drop(other)
            self._strangers.clear()

    def _hang_up(self, stranger: bytes) -> None:
        """On one that has proved nothing, and may have ended by itself."""
        self._strangers.pop(stranger, None)
        self._vain += 1
        self._drop(stranger)
        self._part()

    def _drop(self, connection: bytes) -> None:
        self._send(connection, b"")

    def _part(self) -> None:
        """After a connection has ended: the TEE makes another."""
        if self._role == "tee":
            # Whoever accepts and hangs up at once is not dialled without pause.
            time.sleep(RECONNECT_INTERVAL_MS / 1000)
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(self._endpoint)
            self._dial()

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger=linger_ms)
        self._context.term()


@dataclass(frozen=True)
class ChosenPath:
    """A path that was chosen as a session's endpoint, and what lay there before the session used it.

    The session's GPU processes bind there, and one that is killed leaves its socket.
    """

    path: Path
    laid_before: tuple[int, int, int] | None

    @classmethod
    def of(cls, endpoint: str | None) -> ChosenPath | None:
        if endpoint is None or not endpoint.startswith(IPC):
            return None
        path = Path(endpoint.removeprefix(IPC))
        return cls(path, _identity(path))

    def remove_dead_socket(self) -> None:
        """Removes a socket of this user that was laid there since, and that nobody listens at."""
        if _identity(self.path) in (None, self.laid_before):
            return
        with contextlib.suppress(OSError):
            status = self.path.lstat()
            if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid() and not _has_listener(self.path):
                self.path.unlink()


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.lstat()
    except (OSError, ValueError):
        return None
    # With its time: a file system gives the number of a file that is gone to the next.
    return status.st_dev, status.st_ino, status.st_mtime_ns


def require_usable(endpoint: str, role: str) -> None:
    """What libzmq would not say: the TEE's would try without end, the GPU process's unlinks what lies at the path.

    Raises:
        ConfigError: it is no address, no socket can be made at the path, or somebody else has one there.
    """
    require_endpoint(endpoint)
    path = Path(endpoint.removeprefix(IPC))
    if not endpoint.startswith(IPC):
        return
    if len(str(path).encode()) > MAX_IPC_PATH_BYTES:
        shorter = f"at most {MAX_IPC_PATH_BYTES} bytes after ipc://; set TSQP_SHM_RUNTIME_DIR to a shorter path"
        raise ConfigError("endpoint", endpoint, shorter)
    try:
        around = path.parent.stat()
        replaceable = replaceable_part(path.parent)
        status = path.lstat() if os.path.lexists(path) else None
    except OSError:
        raise ConfigError("endpoint", endpoint, "a path in a folder that exists") from None
    if not stat.S_ISDIR(around.st_mode):
        raise ConfigError("endpoint", endpoint, "a path in a folder that exists")
    if replaceable is not None:
        safe = "a path in a folder in which no other user may put another in its place"
        raise ConfigError("endpoint", endpoint, f"{safe} ({replaceable})")
    if status is None:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError("endpoint", endpoint, "a path that does not exist yet; there is a file that is no socket")
    if status.st_uid != os.geteuid():
        theirs = f"a path of user {os.geteuid()}; the socket there belongs to user {status.st_uid}"
        raise ConfigError("endpoint", endpoint, theirs)
    if role == "gpu" and _has_listener(path):
        raise ConfigError("endpoint", endpoint, "a path that no live session uses")


def _has_listener(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        # One whose queue is full, or of another kind, is somebody's too.
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True
