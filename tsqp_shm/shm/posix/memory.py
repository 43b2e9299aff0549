"""POSIX shared memory: backed and mapped before anyone may use it, unlinked by its creator only."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import stat
from pathlib import Path

import posix_ipc

from tsqp_shm import _native
from tsqp_shm.errors import ArenaError, ArenaMismatch, ArenaNotReady, ArenaTooSmall
from tsqp_shm.shm import layout
from tsqp_shm.shm.transport import Residency

SHM_FOLDER = "/dev/shm"


def arena_name(session: str) -> str:
    """The POSIX shared-memory name of a session's arena; it holds the user id, so users do not meet."""
    return f"/tsqp-shm-{os.geteuid()}-{session}"


class PosixMemory:
    """One mapping of a shared-memory object; use `create`, or `SharedObject.map`."""

    def __init__(self, name: str, fd: int, size_bytes: int, *, creator: bool) -> None:
        self.name = name
        # MAP_POPULATE: every page is entered into the page table now, none while a model runs.
        self.buffer = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self.residency = _lock(self.buffer, size_bytes)
        self._creator = creator
        self._is_closed = False

    @classmethod
    def create(cls, name: str, size_bytes: int) -> PosixMemory:
        """Makes, backs and maps an object.

        Args:
            name: POSIX shared-memory name, "/" and no further slash.

        Raises:
            ArenaTooSmall: /dev/shm has not enough free space.
            ArenaError: an object of that name exists, or the system refuses.
        """
        _require_space(name, size_bytes)
        try:
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError:
            raise ArenaError(name, _taken(name)) from None
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise ArenaError(name, f"cannot be created: {_refusal(error)}") from error
        try:
            # A tmpfs object that is only ftruncate'd is backed page by page later, and a full tmpfs then kills the
            # process with SIGBUS. fallocate takes every page now or says ENOSPC.
            os.posix_fallocate(memory.fd, 0, size_bytes)
            return cls(name, memory.fd, size_bytes, creator=True)
        except BaseException as error:
            # Every kind, as a signal that is to end this process raises one: a large arena takes a while to back.
            posix_ipc.unlink_shared_memory(name)
            if not isinstance(error, OSError):
                raise
            if error.errno == errno.ENOSPC:
                _require_space(name, size_bytes)
                raise _too_small(name, size_bytes, 0) from error
            raise ArenaError(name, f"cannot be backed by memory: {_refusal(error)}") from error
        finally:
            os.close(memory.fd)

    def close(self) -> None:
        """Unmaps, and unlinks where this side created it. Closing twice does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._creator:
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(self.name)
        # A view that somebody still holds keeps the mapping alive; the memory goes with the last view.
        with contextlib.suppress(BufferError):
            self.buffer.close()


class SharedObject:
    """An object that another process of this user made, held by its descriptor: it stays the same one when its name is
    given to another."""

    def __init__(self, name: str, *, read_only: bool = False) -> None:
        """Raises:
        ArenaNotReady: there is none of that name.
        ArenaMismatch: it belongs to another user, or others may open it.
        ArenaError: it cannot be opened.
        """
        self.name = name
        self._fd: int | None = None
        try:
            self._fd = posix_ipc.SharedMemory(name, read_only=read_only).fd
        except posix_ipc.ExistentialError:
            raise ArenaNotReady(name, "does not exist yet") from None
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise ArenaError(name, f"cannot be opened: {_refusal(error)}") from error
        try:
            _require_own(name, self.fd)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        if self._fd is None:
            raise ArenaError(self.name, "is closed")
        return self._fd

    @property
    def is_whole(self) -> bool:
        """Whether it has its size: it is made with none."""
        return os.fstat(self.fd).st_size >= layout.SLOTS_OFFSET_BYTES

    @property
    def is_gone(self) -> bool:
        """Whether it was unlinked: its session has ended, or has another arena by now."""
        return os.fstat(self.fd).st_nlink == 0

    def map(self, size_bytes: int) -> PosixMemory:
        """Raises:
        ArenaNotReady: it has no size yet.
        ArenaMismatch: it has another size.
        ArenaError: it cannot be mapped.
        """
        if not self.is_whole:
            raise ArenaNotReady(self.name, "is still being made")
        found_bytes = os.fstat(self.fd).st_size
        if found_bytes != size_bytes:
            raise ArenaMismatch(self.name, "size in bytes", size_bytes, found_bytes)
        try:
            return PosixMemory(self.name, self.fd, size_bytes, creator=False)
        except (OSError, ValueError) as error:
            raise ArenaError(self.name, f"cannot be mapped: {error}") from error

    def close(self) -> None:
        """Closing twice does nothing."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None


def unlink_arena(name: str) -> bool:
    """Removes the object of a dead session. Returns whether there was one."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        return False
    return True


def _lock(buffer: mmap.mmap, size_bytes: int) -> Residency:
    error = _native.lock_memory(buffer)
    reason = ""
    if error:
        limit_kib = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] >> 10
        reason = f"{os.strerror(error)}; the limit is {limit_kib:,} KiB, raise it with ulimit -l or LimitMEMLOCK"
    return Residency(size_bytes // layout.PAGE_BYTES, not error, reason)


def _require_space(name: str, needed_bytes: int) -> None:
    try:
        filesystem = os.statvfs(SHM_FOLDER)
    except OSError as error:
        raise ArenaError(name, f"{SHM_FOLDER} cannot be used: {error.strerror}; mount a tmpfs there") from error
    free_bytes = filesystem.f_bavail * filesystem.f_frsize
    if free_bytes < needed_bytes:
        raise _too_small(name, needed_bytes, free_bytes)


def _too_small(name: str, needed_bytes: int, free_bytes: int) -> ArenaTooSmall:
    advice = (
        "lower --max-model-len or --max-batch-tokens, or give the container more (docker run --shm-size), "
        "or mount -o remount,size=SIZE /dev/shm"
    )
    return ArenaTooSmall(name, needed_bytes, free_bytes, advice)


def _taken(name: str) -> str:
    try:
        owner = Path(SHM_FOLDER + name).stat().st_uid
    except OSError:
        owner = os.geteuid()
    if owner != os.geteuid():
        return f"exists already and belongs to user {owner}; choose another --session NAME"
    return f"exists already, and not by this session; choose another --session NAME, or remove {SHM_FOLDER}{name}"


def _refusal(error: Exception) -> str:
    """Why the system refused shared memory, and what to change."""
    if isinstance(error, posix_ipc.PermissionsError):
        return f"user {os.geteuid()} may not; {SHM_FOLDER} should have mode 1777, and its objects be the user's own"
    number = error.errno if isinstance(error, OSError) else None
    advice = {
        errno.EROFS: f"mount -o remount,rw {SHM_FOLDER}",
        errno.ENOSPC: f"no more files fit; remove some, or mount -o remount,nr_inodes=0 {SHM_FOLDER}",
        errno.EFBIG: "raise the limit on file sizes: ulimit -f",
        errno.EMFILE: "raise the limit on open files: ulimit -n",
    }.get(number or 0)
    reason = os.strerror(number) if number else str(error)
    return f"{reason}; {advice}" if advice else reason


def _require_own(name: str, fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise ArenaMismatch(name, "owner's user id", os.geteuid(), status.st_uid)
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise ArenaMismatch(name, "mode", "0o600", oct(mode))
