"""Objects of POSIX shared memory by their names: made, locked by their maker, and removed while the name is theirs.

What `shm_open` does is done here by itself: it would wait for the writer of a pipe that somebody laid under the name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from tsqp_shm.errors import ArenaError
from tsqp_shm.files import ForeignFile, is_named, open_own
from tsqp_shm.forks import leave_in_children
from tsqp_shm.shm.posix.locks import try_lock

SHM_FOLDER = "/dev/shm"
# A sweep looks at an object for a moment, and may take one that has no lock yet for a dead one's.
_MAKING_TIMEOUT_S = 1.0
_LOOK_INTERVAL_S = 0.005


def arena_name(session: str) -> str:
    """The POSIX shared-memory name of a session's arena; it holds the user id, so users do not meet."""
    return f"/tsqp-shm-{os.geteuid()}-{session}"


class OwnObject:
    """An object that this process makes, and its lock: while that is held, no sweep takes the object for a dead one's.

    Nothing lies there before `make`; `remove` does nothing to what somebody else has put under the name meanwhile.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._fd: int | None = None
        # Of an open file of its own: `mmap` keeps a copy of the other, which a forked child cannot let go of.
        self._lock_fd: int | None = None
        self._is_making = False
        leave_in_children(self)

    @property
    def path(self) -> Path:
        return Path(SHM_FOLDER + self.name)

    def make(self) -> None:
        """Raises:
        ArenaError: the name is taken, or the system refuses.
        """
        if self.name.count("/") != 1 or not self.name.startswith("/"):
            raise ArenaError(self.name, "cannot be created: a name is a slash and no further one")
        deadline = time.monotonic() + _MAKING_TIMEOUT_S
        try:
            while not self._make_once():
                self.remove()
                if time.monotonic() > deadline:
                    raise ArenaError(
                        self.name, "cannot be created: another process removes or locks it again and again"
                    )
                time.sleep(_LOOK_INTERVAL_S)
        except FileExistsError:
            # What has the name is not this object's.
            self._is_making = False
            raise ArenaError(self.name, _taken(self.path)) from None
        except BaseException as error:
            self.remove()
            if not isinstance(error, OSError):
                raise
            raise ArenaError(self.name, f"cannot be created: {refusal(error)}") from error

    def _make_once(self) -> bool:
        """Returns whether the object is there, and locked by this process."""
        self._is_making = True
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        try:
            self._lock_fd = open_own(self.path)
        except (FileNotFoundError, ForeignFile):
            return False
        return try_lock(self._lock_fd) and is_named(self.path, self._lock_fd) and is_named(self.path, self._fd)

    @property
    def fd(self) -> int:
        if self._fd is None:
            raise ArenaError(self.name, "is closed")
        return self._fd

    def require_whole(self, size_bytes: int) -> None:
        """Raises:
        ArenaError: somebody has changed it since it was made.
        """
        found_bytes = os.fstat(self.fd).st_size
        if found_bytes != size_bytes:
            changed = f"its size was changed from {size_bytes:,} to {found_bytes:,} bytes"
            raise ArenaError(self.name, f"{changed} while it was made; another process of this user did so")
        if not is_named(self.path, self.fd):
            raise ArenaError(
                self.name, "was removed or replaced while it was made; another process of this user did so"
            )

    def remove(self) -> None:
        """Removes it, where the name is still its. Removing twice does nothing."""
        if self._fd is not None:
            if is_named(self.path, self._fd):
                with contextlib.suppress(OSError):
                    self.path.unlink()
        elif self._is_making:
            # A signal came between its making and the note of its descriptor, so it has no lock yet.
            unlink_dead(self.name)
        self._let_go()

    def leave_to_parent(self) -> None:
        """In a forked child, whose object it is not, nor its lock: removes nothing."""
        self._let_go()

    def _let_go(self) -> None:
        self._is_making = False
        for fd in (self._fd, self._lock_fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._lock_fd = None


def unlink_dead(name: str) -> bool:
    """Removes the object of that name if it is this user's and no process lives that holds it as its maker.

    Returns:
        Whether it did.
    """
    path = Path(SHM_FOLDER + name)
    try:
        fd = open_own(path)
    except OSError:
        return False
    try:
        # Whoever has made it, or removes it, holds the lock: so the name stays that object's until this is done.
        if not try_lock(fd) or not is_named(path, fd):
            return False
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _taken(path: Path) -> str:
    try:
        owner = path.lstat().st_uid
    except OSError:
        owner = os.geteuid()
    if owner != os.geteuid():
        return f"exists already and belongs to user {owner}; choose another --session NAME"
    return f"exists already, and not by this session; choose another --session NAME, or remove {path}"


def refusal(error: OSError | ValueError) -> str:
    """Why the system refused shared memory, and what to change."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM):
        return f"user {os.geteuid()} may not; {SHM_FOLDER} should have mode 1777, and its objects be the user's own"
    advice = {
        errno.EROFS: f"mount -o remount,rw {SHM_FOLDER}",
        errno.ENOSPC: f"no more files fit; remove some, or mount -o remount,nr_inodes=0 {SHM_FOLDER}",
        errno.EFBIG: "raise the limit on file sizes: ulimit -f",
        errno.EMFILE: "raise the limit on open files: ulimit -n",
    }.get(number or 0)
    reason = os.strerror(number) if number else str(error)
    return f"{reason}; {advice}" if advice else reason
