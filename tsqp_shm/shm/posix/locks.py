"""Locks of the kernel's (`flock`): taken within a bounded time, and let go of by the kernel at any death."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from tsqp_shm.errors import SessionFolderError
from tsqp_shm.printable import shown

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
            reason = f"locked for more than {timeout_s:.0f} s by {_holder(fd)}"
            raise SessionFolderError(path, reason, "end that process, or set TSQP_SHM_RUNTIME_DIR to another folder")
        time.sleep(_LOOK_INTERVAL_S)


def _holder(fd: int) -> str:
    """Who holds the lock of a file, as far as the kernel says it to this process."""
    status = os.fstat(fd)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            # "1: FLOCK ADVISORY WRITE 4711 00:2f:8 0 EOF"; one that waits has "->" behind its number.
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == file and words[4].isdigit() and int(words[4]):
                return f"process {words[4]}{_command(int(words[4]))}"
    return "another process"


def _command(pid: int) -> str:
    try:
        # UNTRUSTED: a process names itself.
        return f" ({shown(Path(f'/proc/{pid}/comm').read_text(errors='replace').strip(), lines=False)})"
    except OSError:
        return ""
