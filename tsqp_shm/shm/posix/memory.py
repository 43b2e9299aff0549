"""POSIX shared memory: backed and mapped before anyone may use it, and removed by its maker only."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import secrets
import stat
import sys

from tsqp_shm import _native
from tsqp_shm.errors import ArenaError, ArenaMismatch, ArenaNotReady, ArenaTooSmall
from tsqp_shm.files import ForeignFile, open_own
from tsqp_shm.shm import layout
from tsqp_shm.shm.posix.objects import SHM_FOLDER, OwnObject, refusal
from tsqp_shm.shm.transport import Residency

_WORD_BYTES = 8


class PosixMemory:
    """One mapping of a shared-memory object; use `create` or `make`, or `SharedObject.map`."""

    def __init__(self, name: str, fd: int, size_bytes: int, made: OwnObject | None = None) -> None:
        self.name = name
        # MAP_POPULATE: every page is entered into the page table now, none while a model runs.
        self.buffer = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self.residency = _lock_pages(self.buffer, size_bytes)
        self._made = made
        self._is_closed = False

    @classmethod
    def create(cls, name: str, size_bytes: int) -> PosixMemory:
        """`make` of an object that is made here.

        Args:
            name: POSIX shared-memory name, "/" and no further slash.
        """
        return cls.make(OwnObject(name), size_bytes)

    @classmethod
    def make(cls, made: OwnObject, size_bytes: int) -> PosixMemory:
        """Makes, backs and maps an object.

        Raises:
            ArenaTooSmall: /dev/shm has not enough free space.
            ArenaError: an object of that name exists, the system refuses, or another process changes it meanwhile.
        """
        _require_space(made.name, size_bytes)
        made.make()
        try:
            # A tmpfs object that is only ftruncate'd is backed page by page later, and a full tmpfs then kills the
            # process with SIGBUS. fallocate takes every page now or says ENOSPC.
            os.posix_fallocate(made.fd, 0, size_bytes)
            memory = cls(made.name, made.fd, size_bytes, made)
            try:
                made.require_whole(size_bytes)
            except BaseException:
                memory.close()
                raise
            return memory
        except BaseException as error:
            # Every kind, as a signal that is to end this process raises one: a large arena takes a while to back.
            if isinstance(error, ValueError):
                # Python's mmap compares with the size that the object has at that moment.
                with contextlib.suppress(OSError):
                    made.require_whole(size_bytes)
            made.remove()
            if not isinstance(error, (OSError, ValueError)):
                raise
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                _require_space(made.name, size_bytes)
                raise _too_small(made.name, size_bytes, 0) from error
            raise ArenaError(made.name, f"cannot be backed by memory: {refusal(error)}") from error

    def put_secret(self) -> bytes:
        """Writes what only this session's two sides are to know into the header page. Returns it."""
        secret = secrets.token_bytes(layout.SECRET_BYTES)
        with contextlib.closing(_Guarded(self.buffer)):
            for start in range(0, layout.SECRET_BYTES, _WORD_BYTES):
                word = int.from_bytes(secret[start : start + _WORD_BYTES], sys.byteorder)
                _native.store_word(self.buffer, layout.SECRET_OFFSET_BYTES + start, word)
        return secret

    def close(self) -> None:
        """Unmaps, and removes what this side has made. Closing twice does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._made is not None:
            self._made.remove()
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
        ArenaError: it cannot be opened, or is none.
        """
        self.name = name
        self._fd: int | None = None
        try:
            self._fd = open_own(SHM_FOLDER + name, os.O_RDONLY if read_only else os.O_RDWR)
        except FileNotFoundError:
            raise ArenaNotReady(name, "does not exist yet") from None
        except ForeignFile as error:
            raise ArenaError(name, f"cannot be opened: {SHM_FOLDER}{name} {error.strerror}") from None
        except OSError as error:
            raise ArenaError(name, f"cannot be opened: {refusal(error)}") from error
        mode = stat.S_IMODE(os.fstat(self.fd).st_mode)
        if mode & 0o077:
            self.close()
            raise ArenaMismatch(name, "mode", "0o600", oct(mode))

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
            return PosixMemory(self.name, self.fd, size_bytes)
        except (OSError, ValueError) as error:
            raise ArenaError(self.name, f"cannot be mapped: {error}") from error

    def close(self) -> None:
        """Closing twice does nothing."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None


def take_secret(buffer: mmap.mmap) -> bytes:
    """What the TEE has put into a header page with `PosixMemory.put_secret`.

    Raises:
        ProtocolError: the memory was cut short meanwhile.
    """
    with contextlib.closing(_Guarded(buffer)):
        # UNTRUSTED: each word is copied once; only proofs are made of them.
        words = (
            _native.load_word(buffer, layout.SECRET_OFFSET_BYTES + start).to_bytes(_WORD_BYTES, sys.byteorder)
            for start in range(0, layout.SECRET_BYTES, _WORD_BYTES)
        )
        return b"".join(words)


class _Guarded:
    """Keeps this process alive where another one cuts the mapped object short."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._guard = _native.ArenaGuard(buffer)

    def close(self) -> None:
        self._guard.release()


def _lock_pages(buffer: mmap.mmap, size_bytes: int) -> Residency:
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
