"""The arena: one POSIX shared-memory object that both processes map.

Created whole, backed and mapped before anyone can see that it is ready; unlinked by its creator only.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import stat
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import posix_ipc

from tsqp_shm import _native
from tsqp_shm.errors import ArenaError, ArenaMismatch, ArenaNotReady, ArenaTooSmall
from tsqp_shm.shm import layout
from tsqp_shm.shm.plan import Plan

SHM_FOLDER = "/dev/shm"


@dataclass(frozen=True)
class Residency:
    """How the arena's pages are held, for the bring-up report.

    Attributes:
        pages: number of 4 KiB pages, all of them backed and mapped.
        locked: kept from being swapped.
        locked_reason: why not, or "".
    """

    pages: int
    locked: bool
    locked_reason: str


class Arena:
    """One mapping of the shared-memory object; use `Arena.create` or `Arena.attach`."""

    def __init__(self, name: str, buffer: mmap.mmap, plan: Plan, epoch: int, *, creator: bool) -> None:
        self.name = name
        self.plan = plan
        self.epoch = epoch
        # Whoever may open the object may truncate it; then whatever reads the arena next raises ProtocolError.
        self._guard = _native.ArenaGuard(buffer)
        self.residency = _lock(buffer, plan.total_bytes)
        self._buffer: mmap.mmap | None = buffer
        self._creator = creator

    @classmethod
    def create(cls, name: str, plan: Plan, epoch: int) -> Arena:
        """Makes, backs and maps the object; nobody can attach before `publish`.

        Args:
            name: POSIX shared-memory name, "/" and no further slash.
            epoch: random number of this session, not 0.

        Raises:
            ArenaTooSmall: /dev/shm has not enough free space.
            ArenaError: an object of that name exists, or the system refuses.
        """
        _require_space(name, plan.total_bytes)
        try:
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError:
            raise ArenaError(name, _taken(name)) from None
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise ArenaError(name, f"cannot be created: {_refusal(error)}") from error
        try:
            # A tmpfs object that is only ftruncate'd is backed page by page later, and a full tmpfs then kills the
            # process with SIGBUS. fallocate takes every page now or says ENOSPC.
            os.posix_fallocate(memory.fd, 0, plan.total_bytes)
            buffer = _map(memory.fd, plan.total_bytes)
        except BaseException as error:
            # Every kind, as a signal that is to end this process raises one: a large arena takes a while to back.
            posix_ipc.unlink_shared_memory(name)
            if not isinstance(error, OSError):
                raise
            if error.errno == errno.ENOSPC:
                _require_space(name, plan.total_bytes)
                raise _too_small(name, plan.total_bytes, 0) from error
            raise ArenaError(name, f"cannot be backed by memory: {_refusal(error)}") from error
        finally:
            os.close(memory.fd)
        return cls(name, buffer, plan, epoch, creator=True)

    def publish(self) -> None:
        """Writes the header, the version word last: an opener sees "not ready" or a whole header."""
        header = self.buffer
        digest = memoryview(self.plan.digest).cast("Q")
        for offset_bytes, value in (
            *((layout.HEADER_DIGEST_OFFSET_BYTES + 8 * word, value) for word, value in enumerate(digest)),
            (layout.HEADER_MAGIC_OFFSET_BYTES, layout.MAGIC),
            (layout.HEADER_EPOCH_OFFSET_BYTES, self.epoch),
            (layout.HEADER_TOTAL_BYTES_OFFSET_BYTES, self.plan.total_bytes),
            # SYNC POINT: store_word releases; pairs with the acquire load of the version in `attach`.
            (layout.HEADER_VERSION_OFFSET_BYTES, layout.VERSION),
        ):
            _native.store_word(header, offset_bytes, value)

    @classmethod
    def attach(cls, name: str, plan: Plan) -> Arena:
        """Maps a published arena and holds its header against the own plan.

        Raises:
            ArenaNotReady: it does not exist or is not published yet.
            ArenaMismatch: it was made for another plan, by another user or by another version.
            ProtocolError: it was truncated meanwhile.
        """
        try:
            memory = posix_ipc.SharedMemory(name)
        except posix_ipc.ExistentialError:
            raise ArenaNotReady(name, "does not exist yet") from None
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise ArenaError(name, f"cannot be opened: {_refusal(error)}") from error
        try:
            _require_own(name, memory.fd)
            size_bytes = os.fstat(memory.fd).st_size
            if size_bytes < layout.SLOTS_OFFSET_BYTES:
                raise ArenaNotReady(name, "is still being made")
            if size_bytes != plan.total_bytes:
                raise ArenaMismatch(name, "size in bytes", plan.total_bytes, size_bytes)
            buffer = _map(memory.fd, plan.total_bytes)
        except OSError as error:
            raise ArenaError(name, f"cannot be mapped: {error}") from error
        finally:
            os.close(memory.fd)
        arena = cls(name, buffer, plan, 0, creator=False)
        try:
            arena.epoch = _read_header(name, buffer, plan)
        except BaseException:
            arena.close()
            raise
        return arena

    @property
    def buffer(self) -> mmap.mmap:
        """The mapping; whoever keeps a view of it must drop the view before `close`."""
        if self._buffer is None:
            raise ArenaError(self.name, "is closed")
        return self._buffer

    def close(self) -> None:
        """Unmaps, and unlinks where this side created it. Closing twice does nothing."""
        if self._buffer is None:
            return
        if self._creator:
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(self.name)
        self._guard.release()
        # A view that somebody still holds keeps the mapping alive; the memory goes with the last view.
        with contextlib.suppress(BufferError):
            self._buffer.close()
        self._buffer = None

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_buffer", None) is not None:
            warnings.warn(f"arena {self.name} was not closed", ResourceWarning, stacklevel=1)


def unlink_arena(name: str) -> bool:
    """Removes the object of a dead session. Returns whether there was one."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        return False
    return True


def _map(fd: int, size_bytes: int) -> mmap.mmap:
    # MAP_POPULATE: every page is entered into the page table now, none while a model runs.
    populate = getattr(mmap, "MAP_POPULATE", 0)
    return mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | populate)


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


def _read_header(name: str, buffer: mmap.mmap, plan: Plan) -> int:
    # UNTRUSTED: each word is read once and only compared; the size and the layout are the own plan's.
    # SYNC POINT: load_word acquires; pairs with the release store of the version in `publish`.
    version = _native.load_word(buffer, layout.HEADER_VERSION_OFFSET_BYTES)
    if version == 0:
        raise ArenaNotReady(name, "is not published yet")
    magic = _native.load_word(buffer, layout.HEADER_MAGIC_OFFSET_BYTES)
    epoch = _native.load_word(buffer, layout.HEADER_EPOCH_OFFSET_BYTES)
    total_bytes = _native.load_word(buffer, layout.HEADER_TOTAL_BYTES_OFFSET_BYTES)
    digest = b"".join(
        _native.load_word(buffer, offset_bytes).to_bytes(8, sys.byteorder)
        for offset_bytes in range(layout.HEADER_DIGEST_OFFSET_BYTES, layout.HEADER_BYTES, 8)
    )
    for field, expected, found in (
        ("magic", f"{layout.MAGIC:#x}", f"{magic:#x}"),
        ("layout version", layout.VERSION, version),
        ("total bytes", plan.total_bytes, total_bytes),
        ("plan digest", plan.digest.hex(), digest.hex()),
    ):
        if expected != found:
            raise ArenaMismatch(name, field, expected, found)
    return epoch
