"""Descriptors that nobody takes for standard input, output or error, though those of this process be closed."""

from __future__ import annotations

import fcntl
import os
import socket

_FIRST_FREE_DESCRIPTOR = 3


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A pair of connected sockets; a child does not inherit them."""
    one, other = socket.socketpair()
    with one, other:
        return _apart(one), _apart(other)


def _apart(end: socket.socket) -> socket.socket:
    return socket.socket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_DESCRIPTOR))


def memory_file(name: str, content: bytes) -> int:
    """A descriptor of a file without a name that holds this, to be read from its beginning; the caller closes it."""
    first = os.memfd_create(name)
    try:
        descriptor = fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_DESCRIPTOR)
    finally:
        os.close(first)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
