"""The transport within one process: memory without a name, and a pair of sockets between two threads.

For tests, and for whoever wants to look at both sides at once: it keeps nothing from anybody. What is the whole
process's stays so, the number of threads that compute above all.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Callable
from pathlib import Path

from tsqp_shm.errors import ArenaError, ArenaMismatch, ArenaNotReady, SessionBusy
from tsqp_shm.shm import layout
from tsqp_shm.shm.byte_stream import ByteStream
from tsqp_shm.shm.rendezvous import Sought, wait_for_tee
from tsqp_shm.shm.transport import Residency

# None that a session of another transport can have.
NAME = "(local)"


class LocalTransport:
    """Carries one session; `shm.transport.Transport` says what the methods do. Both threads take the same object."""

    def __init__(self) -> None:
        self._hold: LocalHold | None = None

    def begin(self) -> LocalHold:
        if self._hold is not None and not self._hold.has_ended:
            raise SessionBusy(NAME, os.getpid())
        self._hold = LocalHold()
        return self._hold

    def join(self, timeout_s: float, notify: Callable[[str], None]) -> LocalJoined:
        sought = Sought(NAME, "the TEE's thread", "no TEE began a session", "begin one over the same LocalTransport")
        candidate, invitation = wait_for_tee(self._find, sought, timeout_s, notify)
        candidate.close()
        return LocalJoined(candidate.shared, invitation)

    def _find(self) -> LocalGlance | None:
        if self._hold is not None and self._hold.has_ended:
            raise ArenaNotReady(NAME, "its session has ended")
        shared = None if self._hold is None else self._hold.shared
        return None if shared is None else LocalGlance(shared)

    def glance(self) -> LocalGlance:
        glance = self._find()
        if glance is None:
            raise ArenaNotReady(NAME, "there is none at the moment")
        return glance


class _Shared:
    """What both sides hold of one memory: it goes with the last of them."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.is_gone = False
        try:
            self._fd = os.memfd_create("tsqp-shm", os.MFD_CLOEXEC)
            os.posix_fallocate(self._fd, 0, size_bytes)
        except OSError as error:
            raise ArenaError(NAME, f"cannot be backed by memory: {error.strerror}") from error
        self._ends = dict(zip(("tee", "gpu"), socket.socketpair(), strict=True))

    def map(self, size_bytes: int) -> mmap.mmap:
        return mmap.mmap(self._fd, size_bytes)

    def open_waker(self, role: str) -> ByteStream:
        return ByteStream(os.dup(self._ends[role].fileno()))

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            os.close(self._fd)
            for end in self._ends.values():
                end.close()


class LocalMemory:
    """One side's mapping."""

    def __init__(self, shared: _Shared, *, creator: bool) -> None:
        self.name = NAME
        self.buffer = shared.map(shared.size_bytes)
        self.residency = Residency(
            shared.size_bytes // layout.PAGE_BYTES, locked=False, locked_reason="both sides are one process"
        )
        self._shared = shared
        self._creator = creator

    def close(self) -> None:
        self._shared.is_gone |= self._creator
        # A view that somebody still holds keeps the mapping alive; the memory goes with the last view.
        with contextlib.suppress(BufferError):
            self.buffer.close()


class LocalHold:
    """The TEE's side."""

    def __init__(self) -> None:
        self.name = NAME
        self.folder: Path | None = None
        self.gpu_flags: tuple[str, ...] = ()
        self.endpoint = ""
        self.has_ended = False
        self._made: _Shared | None = None

    @property
    def shared(self) -> _Shared | None:
        """What was made last, while it is there."""
        return None if self._made is None or self._made.is_gone else self._made

    def create_memory(self, size_bytes: int) -> LocalMemory:
        self._made = _Shared(size_bytes)
        return LocalMemory(self._made, creator=True)

    def open_waker(self) -> ByteStream:
        if self._made is None:
            raise ArenaError(NAME, "is not made yet")
        return self._made.open_waker("tee")

    def end(self) -> None:
        self.has_ended = True
        self._made = None


class LocalJoined:
    """The GPU process's side, on its thread."""

    def __init__(self, shared: _Shared, invitation: bytes) -> None:
        self.name = NAME
        self.invitation = invitation
        self._shared: _Shared | None = shared

    def map_memory(self, size_bytes: int) -> LocalMemory:
        if size_bytes != self._held.size_bytes:
            raise ArenaMismatch(NAME, "size in bytes", size_bytes, self._held.size_bytes)
        return LocalMemory(self._held, creator=False)

    def open_waker(self, endpoint: str) -> ByteStream:
        return self._held.open_waker("gpu")

    @property
    def _held(self) -> _Shared:
        if self._shared is None:
            raise ArenaError(NAME, "is closed")
        return self._shared

    def close(self) -> None:
        self._shared = None


class LocalGlance:
    """A mapping of what lies before the slots, for whoever looks and for whoever wants to join."""

    def __init__(self, shared: _Shared) -> None:
        self.name = NAME
        self.shared = shared
        self.buffer = shared.map(layout.SLOTS_OFFSET_BYTES)

    def read(self) -> bytes:
        # UNTRUSTED: for display only.
        return self.buffer[:]

    @property
    def is_gone(self) -> bool:
        return self.shared.is_gone

    def close(self) -> None:
        self.buffer.close()
