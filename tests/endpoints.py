"""Addresses for a test's sockets."""

from __future__ import annotations

import socket


def free_tcp_endpoint() -> str:
    """Of a port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
