"""A session's name, and what must be gone when it ends: the lock and the folder are the TEE's to hold."""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from pathlib import Path

from tsqp_shm.config import require_session_name
from tsqp_shm.errors import ArenaError, SessionBusy, SessionFolderError
from tsqp_shm.shm.posix.folder import (
    LOCK_FILE,
    owner_pid,
    remove_session,
    root_lock,
    sessions_folder,
    storing,
    sweep,
    try_lock,
)
from tsqp_shm.shm.posix.memory import PosixMemory, arena_name, unlink_arena
from tsqp_shm.shm.posix.stream import ZmqStream

SOCKET_FILE = "doorbell"


def new_session_name() -> str:
    return f"s{os.getpid()}-{secrets.token_hex(3)}"


class Session:
    """The TEE's hold on a session's name; use `Session.begin`."""

    def __init__(self, name: str, folder: Path, lock_fd: int, endpoint: str | None) -> None:
        self.name = name
        self.folder = folder
        self._endpoint = endpoint
        self._lock_fd: int | None = lock_fd
        self._has_arena = False
        self._arenas = 0
        _begun.add(self)

    @classmethod
    def begin(cls, name: str | None = None, endpoint: str | None = None, *, sweeps: bool = True) -> Session:
        """Sweeps dead sessions and takes a name.

        Args:
            name: None: a new one.
            endpoint: of every waker, `ipc://PATH` or `tcp://127.0.0.1:PORT`; None: a socket in the session's folder.
            sweeps: False leaves dead sessions as they are, to be looked at.

        Raises:
            SessionBusy: a live session has the name.
            ConfigError: the name is malformed.
            SessionFolderError: the folder is full or read-only.
        """
        name = name or new_session_name()
        require_session_name(name)
        root = sessions_folder()
        with root_lock(root):
            if sweeps:
                sweep(root)
            folder = root / name
            with storing(folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            try:
                lock_fd = try_lock(folder)
            except SessionFolderError:
                # If nothing is in it, it was made just now.
                with contextlib.suppress(OSError):
                    folder.rmdir()
                raise
            if lock_fd is None:
                raise SessionBusy(name, owner_pid(folder))
            try:
                with storing(folder / LOCK_FILE):
                    os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
            except SessionFolderError:
                remove_session(folder)
                os.close(lock_fd)
                raise
        return cls(name, folder, lock_fd, endpoint)

    @property
    def arena_name(self) -> str:
        return arena_name(self.name)

    @property
    def gpu_flags(self) -> tuple[str, ...]:
        return ("--session", self.name)

    @property
    def endpoint(self) -> str:
        """Of the arena made last: a GPU process that was only believed dead would come back to the socket it knows."""
        if self._endpoint is not None:
            return self._endpoint
        return f"ipc://{self.folder / SOCKET_FILE}" + (f".{self._arenas}" if self._arenas > 1 else "")

    def create_memory(self, size_bytes: int) -> PosixMemory:
        """`PosixMemory.create` under this session's name; the session's end sees to it that none is left.

        A session has one at a time.

        Raises:
            ArenaError: as `PosixMemory.create`.
        """
        # libzmq leaves the file of an earlier arena's socket.
        for socket in self.folder.glob(f"{SOCKET_FILE}*"):
            if socket.is_socket():
                socket.unlink()
        self._has_arena = True
        self._arenas += 1
        try:
            return PosixMemory.create(self.arena_name, size_bytes)
        except ArenaError:
            # Nothing of this session's is left, and what has the name is somebody else's.
            self._has_arena = False
            raise

    def open_waker(self) -> ZmqStream:
        return ZmqStream(self.endpoint, "tee")

    def end(self) -> None:
        """Removes the folder and lets go of the name. Ending twice does nothing."""
        if self._lock_fd is None:
            return
        with root_lock(self.folder.parent):
            if self._has_arena:
                # As a rule it is gone by now; not if a signal came between its making and whoever was to close it.
                # Without the folder no sweep would find it.
                unlink_arena(self.arena_name)
            remove_session(self.folder)
            os.close(self._lock_fd)
        self._lock_fd = None

    def _leave_to_parent(self) -> None:
        """In a forked child: the lock is the parent's alone, or the child would hold it for a parent that died."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        self._lock_fd = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


# What a fork has to let go of.
_begun: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork() -> None:
    for session in list(_begun):
        session._leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)
