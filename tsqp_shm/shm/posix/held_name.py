"""A session's name, as a TEE process holds it: by the lock in a folder of that name."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tsqp_shm.config import require_session_name
from tsqp_shm.files import is_named
from tsqp_shm.forks import leave_in_children
from tsqp_shm.shm.posix.folder import LOCK_FILE, remove_session, root_lock, sessions_folder, sweep, take_name


def new_session_name() -> str:
    return f"s{os.getpid()}-{secrets.token_hex(3)}"


class HeldName:
    """Taken by `HeldName.take`, until `let_go`."""

    def __init__(self, name: str, folder: Path, lock_fd: int) -> None:
        self.name = name
        self.folder = folder
        self._lock_fd: int | None = lock_fd
        leave_in_children(self)

    @classmethod
    def take(cls, name: str | None = None, *, sweeps: bool = True) -> HeldName:
        """Sweeps dead sessions and takes a name.

        Args:
            name: None: a new one.
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
        return cls(name, root / name, lock_fd)

    @property
    def is_held(self) -> bool:
        return self._lock_fd is not None

    @property
    def has_folder(self) -> bool:
        """Whether the folder of the name is this session's: somebody may have removed it, and another session begun."""
        return self._lock_fd is not None and is_named(self.folder / LOCK_FILE, self._lock_fd)

    def let_go(self) -> None:
        """Removes the folder with what a session makes in it, and gives the name up. Doing so twice does nothing."""
        if self._lock_fd is None:
            return
        # Without the root's lock, which somebody else may keep: the name is given up in one step, at the last moment.
        if self.has_folder:
            remove_session(self.folder)
        os.close(self._lock_fd)
        self._lock_fd = None

    def leave_to_parent(self) -> None:
        """In a forked child: the lock is the parent's alone, or the child would hold it for a parent that died."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        self._lock_fd = None
