"""Addresses for a test's sockets, and ends of connections that are no `ZmqStream`."""

from __future__ import annotations

import socket

from tsqp_shm.shm.posix.handshake import NONCE_BYTES, PROOF_BYTES, Handshake, tcp_ends
from tsqp_shm.shm.posix.stream import ZmqStream

# Of a doorbell that a test opens without a session.
SECRET = bytes(range(32))


def free_tcp_endpoint() -> str:
    """Of a port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def connect_to(endpoint: str) -> socket.socket:
    """A plain connection to who listens at an endpoint."""
    scheme, _, address = endpoint.partition("://")
    connection = socket.socket(socket.AF_UNIX if scheme == "ipc" else socket.AF_INET)
    host, _, port = address.partition(":")
    connection.connect(address if scheme == "ipc" else (host, int(port)))
    return connection


def listen_at(endpoint: str) -> socket.socket:
    """A plain socket in the place of a GPU process's."""
    scheme, _, address = endpoint.partition("://")
    listening = socket.socket(socket.AF_UNIX if scheme == "ipc" else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    host, _, port = address.partition(":")
    listening.bind(address if scheme == "ipc" else (host, int(port)))
    listening.listen()
    return listening


def meet(*ends: ZmqStream) -> None:
    """Goes on with both ends of one thread until each has proved itself: otherwise that takes two that look."""
    while not all([end.is_connected() for end in ends]):
        pass


def prove(connection: socket.socket, role: str, secret: bytes = SECRET) -> None:
    """Does what a peer that knows the secret does first. The other side has to be looking."""
    ends = tcp_ends(connection.fileno(), role) if connection.family == socket.AF_INET else b""
    handshake = Handshake(secret, role, ends)
    connection.sendall(handshake.hello)
    connection.sendall(handshake.push(_received(connection, NONCE_BYTES)))
    handshake.push(_received(connection, PROOF_BYTES))
    assert handshake.is_proven


def _received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        assert chunk, "the other side has hung up"
        data += chunk
    return data
