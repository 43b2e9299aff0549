"""The waker over ZeroMQ: the bytes of one connection at an `ipc://` or `tcp://` address of this machine."""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path

import zmq

from tsqp_shm.config import require_endpoint
from tsqp_shm.errors import ConfigError
from tsqp_shm.shm import layout
from tsqp_shm.shm.record_stream import RecordStream

# The kernel's sockaddr_un holds 108 bytes with the final zero; libzmq refuses more.
MAX_IPC_PATH_BYTES = 107
# Of up to 8 KiB each, as libzmq reads them off a connection. As many as an honest peer has records on their way, and
# two: a libzmq that has stopped reading drops the rest of a connection whose other end closes, the last word included.
MAX_CHUNKS = layout.RING_DEPTH + 2
# How often the TEE looks whether the GPU process has its socket yet.
RECONNECT_INTERVAL_MS = 20


class ZmqStream(RecordStream):
    """A ZeroMQ STREAM socket: the bytes of one connection. The GPU process binds, the TEE connects.

    Not PAIR: libzmq limits a frame and not a message, and would collect the frames of one that never ends. Of a stream
    it holds MAX_CHUNKS at most; the rest stays with the kernel, which stops the sender. And the TEE listens nowhere:
    whoever connects more often than it has file descriptors makes libzmq abort the process that does.
    """

    def __init__(self, endpoint: str, role: str) -> None:
        """Opens an end, "tee" or "gpu".

        Raises:
            ConfigError: no socket can be made at the endpoint, or somebody else has one there.
        """
        super().__init__()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.STREAM)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, MAX_CHUNKS)
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
        if not self.is_connected():
            return False
        try:
            self._socket.send_multipart([self._connections[0], record], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
            return False
        return True

    def is_connected(self) -> bool:
        """Whether the peer is; of the GPU process, the TEE takes it for granted."""
        if not self._connections and self.wait(0):
            self._take()
        return bool(self._connections)

    def wait(self, timeout_ns: int) -> bool:
        """Sleeps until something is there."""
        # Rounded up: a slice that ends before the watch's next look is due would double the time between looks.
        return bool(self._socket.poll(-(-timeout_ns // 1_000_000), zmq.POLLIN))

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


def require_usable(endpoint: str, role: str) -> None:
    """What libzmq would not say: the TEE's would try without end, the GPU process's unlinks what lies at the path.

    Raises:
        ConfigError: it is no address, no socket can be made at the path, or somebody else has one there.
    """
    require_endpoint(endpoint)
    path = Path(endpoint.removeprefix("ipc://"))
    if not endpoint.startswith("ipc://"):
        return
    if len(str(path).encode()) > MAX_IPC_PATH_BYTES:
        shorter = f"at most {MAX_IPC_PATH_BYTES} bytes after ipc://; set TSQP_SHM_RUNTIME_DIR to a shorter path"
        raise ConfigError("endpoint", endpoint, shorter)
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
