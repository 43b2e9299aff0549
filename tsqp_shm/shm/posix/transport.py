"""Sessions over POSIX shared memory: two processes of one user find each other by the name of a session."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import suppress

from tsqp_shm.config import require_session_name
from tsqp_shm.errors import ArenaError, ArenaNotReady, ConfigError
from tsqp_shm.shm import layout
from tsqp_shm.shm.posix.folder import PAGE_FILE, list_sessions, sessions_folder
from tsqp_shm.shm.posix.memory import PosixMemory, SharedObject, take_secret
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.shm.posix.register import PageGlance
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.stream import ZmqStream
from tsqp_shm.shm.rendezvous import Sought, wait_for_tee
from tsqp_shm.shm.transport import Glance


class PosixTransport:
    """Carries the session of one name; `shm.transport.Transport` says what the methods do.

    Args:
        session: its name; None, which only a TEE may give: a new one.
        endpoint: of the waker, `ipc://PATH` or `tcp://127.0.0.1:PORT`, chosen by the TEE; None: a socket of its own.
    """

    def __init__(self, session: str | None = None, endpoint: str | None = None) -> None:
        self._session = session
        self._endpoint = endpoint

    @property
    def _name(self) -> str:
        if self._session is None:
            raise ConfigError("session", None, "--session NAME, the name the TEE process uses")
        require_session_name(self._session)
        return self._session

    def begin(self) -> Session:
        return Session.begin(self._session, self._endpoint)

    def join(self, timeout_s: float, notify: Callable[[str], None]) -> PosixJoined:
        name = self._name
        sought = Sought(
            arena_name(name),
            f"the TEE process of session {name!r}",
            f"no TEE process began session {name!r}",
            f"start it with: tsqp-shm tee MODEL --session {name}",
        )

        def find() -> PosixCandidate | None:
            _refuse_alone(name)
            return _find(arena_name(name))

        candidate, invitation = wait_for_tee(find, sought, timeout_s, notify)
        try:
            secret = take_secret(candidate.buffer)
            candidate.buffer.close()
        except BaseException:
            candidate.close()
            raise
        return PosixJoined(candidate.shared, invitation, secret)

    def glance(self) -> Glance:
        name = self._name
        with suppress(OSError):
            return PageGlance(sessions_folder() / name)
        try:
            return PosixGlance(SharedObject(arena_name(name), read_only=True))
        except ArenaNotReady:
            raise ArenaNotReady(arena_name(name), f"session {name!r} has none at the moment") from None


class PosixCandidate:
    """An object of the session's name, of which what lies before the slots is mapped."""

    def __init__(self, shared: SharedObject) -> None:
        self.shared = shared
        self.name = shared.name
        self.buffer = mmap.mmap(shared.fd, layout.SLOTS_OFFSET_BYTES)

    @property
    def is_gone(self) -> bool:
        return self.shared.is_gone

    def close(self) -> None:
        self.buffer.close()
        self.shared.close()


class PosixJoined:
    """The GPU process's side of a session."""

    def __init__(self, shared: SharedObject, invitation: bytes, secret: bytes) -> None:
        self.name = shared.name
        self.invitation = invitation
        self._secret = secret
        self._shared = shared

    def map_memory(self, size_bytes: int) -> PosixMemory:
        return self._shared.map(size_bytes)

    def open_waker(self, endpoint: str) -> ZmqStream:
        return ZmqStream(endpoint, "gpu", self._secret)

    def close(self) -> None:
        self._shared.close()


class PosixGlance:
    """A look through a read-only descriptor, which maps nothing."""

    def __init__(self, shared: SharedObject) -> None:
        self._shared = shared

    def read(self) -> bytes:
        # UNTRUSTED: for display only.
        size_bytes = layout.SLOTS_OFFSET_BYTES
        return os.pread(self._shared.fd, size_bytes, 0).ljust(size_bytes, b"\0")

    @property
    def is_gone(self) -> bool:
        return self._shared.is_gone

    def close(self) -> None:
        self._shared.close()


def _refuse_alone(name: str) -> None:
    """Raises:
    ConfigError: the session of that name lives, and has no GPU process.
    """
    for found in list_sessions():
        if found.name == name and found.is_alive and (found.folder / PAGE_FILE).exists():
            raise ConfigError("session", name, "one whose mode has a GPU process; this one's has none")


def _find(name: str) -> PosixCandidate | None:
    try:
        shared = SharedObject(name)
    except ArenaNotReady:
        return None
    try:
        if shared.is_whole:
            return PosixCandidate(shared)
    except BaseException as error:
        shared.close()
        if isinstance(error, (OSError, ValueError)):
            raise ArenaError(name, f"cannot be mapped: {error}") from error
        raise
    # It is being made: looked for again, as its maker may die over it.
    shared.close()
    return None
