"""A session's name, and what must be gone when it ends: the lock and the folder are the TEE's to hold."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tsqp_shm.config import require_session_name
from tsqp_shm.files import is_named
from tsqp_shm.forks import leave_in_children
from tsqp_shm.shm.posix.folder import (
    LOCK_FILE,
    SOCKET_FILE,
    remove_session,
    remove_sockets,
    root_lock,
    sessions_folder,
    sweep,
    take_name,
)
from tsqp_shm.shm.posix.memory import PosixMemory
from tsqp_shm.shm.posix.objects import OwnObject, arena_name
from tsqp_shm.shm.posix.stream import ChosenPath, ZmqStream


def new_session_name() -> str:
    return f"s{os.getpid()}-{secrets.token_hex(3)}"


class Session:
    """The TEE's hold on a session's name; use `Session.begin`."""

    def __init__(self, name: str, folder: Path, lock_fd: int, endpoint: str | None) -> None:
        self.name = name
        self.folder = folder
        self._endpoint = endpoint
        self._lock_fd: int | None = lock_fd
        # Of the memory made last: the object under its name, and what proves a process to be of this session.
        self._object: OwnObject | None = None
        self._secret = b""
        self._chosen_path: ChosenPath | None = None
        self._arenas = 0
        leave_in_children(self)

    @classmethod
    def begin(cls, name: str | None = None, endpoint: str | None = None, *, sweeps: bool = True) -> Session:
        """Sweeps dead sessions and takes a name.

        Args:
            name: None: a new one.
            endpoint: of every waker, `ipc://PATH` or `tcp://127.0.0.1:PORT`; None: a socket in the session's folder.
            sweeps: False leaves dead sessions of other names as they are, to be looked at.

        Raises:
            SessionBusy: a live session has the name.
            ConfigError: the name is malformed.
            SessionFolderError: the folder is full, read-only or kept locked, or what no session made has the name.
        """
        name = name or new_session_name()
        require_session_name(name)
        root = sessions_folder()
        with root_lock(root):
            sweep(root, only=None if sweeps else name)
            lock_fd = take_name(root, name)
        return cls(name, root / name, lock_fd, endpoint)

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
        if self._has_folder():
            remove_sockets(self.folder)
        self._arenas += 1
        # Noted before anything lies under the name, so that the session's end finds it whenever a signal comes.
        self._object = OwnObject(self.arena_name)
        memory = PosixMemory.make(self._object, size_bytes)
        try:
            self._secret = memory.put_secret()
        except BaseException:
            memory.close()
            raise
        return memory

    def open_waker(self) -> ZmqStream:
        # Before any GPU process is invited there.
        self._chosen_path = self._chosen_path or ChosenPath.of(self._endpoint)
        return ZmqStream(self.endpoint, "tee", self._secret)

    def _has_folder(self) -> bool:
        """Whether the folder of the name is this session's: somebody may have removed it, and another session begun."""
        return self._lock_fd is not None and is_named(self.folder / LOCK_FILE, self._lock_fd)

    def end(self) -> None:
        """Removes the folder and lets go of the name. Ending twice does nothing."""
        if self._lock_fd is None:
            return
        # Without the root's lock, which somebody else may keep: the name is given up in one step, at the last moment.
        if self._object is not None:
            # As a rule it is gone by now; not if a signal came between its making and whoever was to close it.
            self._object.remove()
        if self._chosen_path is not None:
            self._chosen_path.remove_dead_socket()
        if self._has_folder():
            remove_session(self.folder)
        os.close(self._lock_fd)
        self._lock_fd = None

    def leave_to_parent(self) -> None:
        """In a forked child: the lock is the parent's alone, or the child would hold it for a parent that died."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        self._lock_fd = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
