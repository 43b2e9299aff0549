"""Locks of the kernel's (`flock`): taken within a bounded time, and let go of by the kernel at any death."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

from tsqp_shm.errors import SessionFolderError
from tsqp_shm.files import lock_holder

# Whoever honestly holds one does so for milliseconds.
LOCK_TIMEOUT_S = 2.0
_LOOK_INTERVAL_S = 0.005


def try_lock(fd: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_lock(fd: int, path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> None:
    """Takes it for this process alone.

    Args:
        path: of the file, for the error.

    Raises:
        SessionFolderError: somebody else keeps it.
    """
    deadline = time.monotonic() + timeout_s
    # By looking again and again: a `flock` that waits would do so for as long as a process that is stopped, or hostile,
    # holds the lock.
    while not try_lock(fd):
        if time.monotonic() > deadline:
            reason = f"locked for more than {timeout_s:.0f} s by {lock_holder(fd)}"
            raise SessionFolderError(path, reason, "end that process, or set TSQP_SHM_RUNTIME_DIR to another folder")
        time.sleep(_LOOK_INTERVAL_S)
