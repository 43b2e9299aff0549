"""The folder in which sessions lie: whose they are, which are dead, and what is removed of those.

    FOLDER/                 mode 0700, and nothing but sessions is looked for in it
        .lock               held while a session begins or is swept
        .passing-HEX/       a session on its way in or out
        NAME/               a session; it appears with its lock held, and its name is free at once when it goes
            lock            says that a session made the folder; held by the TEE process while it lives, and the kernel
                            lets go of it at any death
            doorbell        the ZeroMQ socket, unless another endpoint was chosen; doorbell.2 that of a second arena
            page            in the place of an arena, where there is no GPU process: what the session is and how far
            stats           a socket, in a mode whose arena carries no times: what `top` is told instead

FOLDER is $TSQP_SHM_RUNTIME_DIR/tsqp-shm, else $XDG_RUNTIME_DIR/tsqp-shm, else /tmp/tsqp-shm-UID. It is a folder of our
own, as the one around it may be a home. What no session has made is left alone wherever it lies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tsqp_shm.config import SESSION_NAME
from tsqp_shm.errors import ConfigError, SessionBusy, SessionFolderError, TsqpError
from tsqp_shm.files import open_own, opened_own_folder, replaceable_part
from tsqp_shm.shm.posix.locks import take_lock, try_lock
from tsqp_shm.shm.posix.objects import arena_name, unlink_dead
from tsqp_shm.shm.progress import STATS_SOCKET

LOCK_FILE = "lock"
PAGE_FILE = "page"
SOCKET_FILE = "doorbell"
# What the lock of a session begins with; the pid of its TEE process follows.
_MARK = b"tsqp-shm session\n"
_MAX_LOCK_BYTES = 64
_CURE = "chmod 700 it if it is yours, else set TSQP_SHM_RUNTIME_DIR"
_PASSING = re.compile(r"\.passing-[0-9a-f]{16}")
_DOORBELL = re.compile(rf"{SOCKET_FILE}(\.[0-9]+|-[a-z-]+)?")
_STATS = re.compile(STATS_SOCKET)


def sweep_dead_sessions() -> list[str]:
    """Removes what sessions left behind whose TEE process is dead. Returns their names.

    Raises:
        ConfigError, SessionFolderError: the folder cannot be used, or somebody keeps it locked.
    """
    root = sessions_folder()
    with root_lock(root):
        return sweep(root)


@contextlib.contextmanager
def swept_afterwards() -> Iterator[None]:
    """Sweeps when the block is left; what keeps it from that comes behind the error that the block itself ends with."""
    try:
        yield
    except BaseException as error:
        try:
            sweep_dead_sessions()
        except TsqpError as second:
            if isinstance(error, TsqpError):
                error.args = (f"{error}; what dead processes left was not removed: {second}",)
        raise
    sweep_dead_sessions()


@dataclass(frozen=True)
class FoundSession:
    """A session as it lies in the folder.

    Attributes:
        is_alive: whether its TEE process holds the lock.
        tee_pid: as that process wrote it, in its own pid namespace; None if it did not.
    """

    name: str
    folder: Path
    is_alive: bool
    tee_pid: int | None


def list_sessions() -> list[FoundSession]:
    """Every session of this user, live or dead, by name; nothing is changed, and no lock is waited for."""
    return list(_sessions(sessions_folder()))


def sessions_folder() -> Path:
    """The folder of this user's sessions, made with mode 0700.

    Raises:
        SessionFolderError: it cannot be made.
        ConfigError: it belongs to somebody else, others may write to it, or might put another in its place.
    """
    chosen = os.environ.get("TSQP_SHM_RUNTIME_DIR") or os.environ.get("XDG_RUNTIME_DIR")
    root = Path(chosen) / "tsqp-shm" if chosen else Path(tempfile.gettempdir()) / f"tsqp-shm-{os.geteuid()}"
    with storing(root):
        root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replaceable = replaceable_part(root.parent)
        root.mkdir(mode=0o700, exist_ok=True)
        status = root.lstat()
    if replaceable is not None:
        safe = "one that no user but you and root may put another in the place of"
        raise ConfigError("session folder", str(root), f"{safe} ({replaceable}); {_CURE}")
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise _unsafe(root, status, f"a folder of user {os.geteuid()} with mode 0700")
    return root


def _unsafe(folder: Path, status: os.stat_result, expected: str) -> ConfigError:
    kind = "" if stat.S_ISDIR(status.st_mode) else "no folder, "
    found = f"it is {kind}of user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}"
    return ConfigError("session folder", str(folder), f"{expected} ({found}); {_CURE}")


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SessionFolderError(path, error.strerror or str(error)) from error


@contextlib.contextmanager
def root_lock(root: Path) -> Iterator[None]:
    """Held while a session begins or is swept, so that two do not take one name, nor a sweep what is on its way in.

    Raises:
        SessionFolderError: it cannot be taken, or somebody else keeps it.
    """
    path = root / ".lock"
    with storing(path):
        fd = open_own(path, os.O_RDWR | os.O_CREAT, most_bytes=0)
    try:
        take_lock(fd, path)
        yield
    finally:
        # Not by closing alone: a child that was forked meanwhile holds the same open file.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def take_name(root: Path, name: str) -> int:
    """Makes the folder of a session, which appears with its lock held; under the root's lock.

    Returns:
        The lock's descriptor.

    Raises:
        SessionBusy: a live session has the name.
        SessionFolderError: what no session made has it, or the folder cannot be written.
    """
    folder = root / name
    found = _session(folder)
    if found is not None and found.is_alive:
        raise SessionBusy(name, found.tee_pid)
    if os.path.lexists(folder):
        raise SessionFolderError(
            folder, "there is something that no session has made", "move it away, or choose another --session NAME"
        )
    passing = _passing(root)
    lock_fd = None
    try:
        with storing(passing):
            passing.mkdir(mode=0o700)
        with storing(passing / LOCK_FILE):
            lock_fd = open_own(passing / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            os.write(lock_fd, _MARK + f"{os.getpid()}\n".encode())
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with storing(folder):
            passing.rename(folder)
    except BaseException:
        _remove_passing(passing, by_owner=True)
        if lock_fd is not None:
            os.close(lock_fd)
        raise
    return lock_fd


def _passing(root: Path) -> Path:
    return root / f".passing-{secrets.token_hex(8)}"


def _sessions(root: Path) -> Iterator[FoundSession]:
    with storing(root):
        folders = sorted(root.iterdir())
    for folder in folders:
        found = _session(folder)
        if found is not None:
            yield found


def _session(folder: Path) -> FoundSession | None:
    """The session that made this folder; None: none did, and it is nothing of ours."""
    if not SESSION_NAME.fullmatch(folder.name):
        return None
    with contextlib.suppress(OSError), opened_own_folder(folder) as folder_fd:
        fd = open_own(LOCK_FILE, dir_fd=folder_fd, most_bytes=_MAX_LOCK_BYTES)
        try:
            # UNTRUSTED: whatever process of this user wrote it; the pid is shown, and nothing follows from it.
            mark, _, pid = os.read(fd, _MAX_LOCK_BYTES).partition(b"\n")
            if mark + b"\n" != _MARK:
                return None
            # Shared, so that two lookers do not take each other for the owner.
            is_alive = not try_lock(fd, fcntl.LOCK_SH)
            return FoundSession(folder.name, folder, is_alive, int(pid) if pid.strip().isdigit() else None)
        finally:
            os.close(fd)
    return None


def sweep(root: Path, only: str | None = None) -> list[str]:
    """Removes dead sessions, or that of one name alone; under the root's lock. Returns their names."""
    swept = []
    for session in _sessions(root):
        if not session.is_alive and only in (None, session.name):
            unlink_dead(arena_name(session.name))
            remove_session(session.folder)
            swept.append(session.name)
    with storing(root):
        passing = [folder for folder in root.iterdir() if _PASSING.fullmatch(folder.name)]
    for folder in passing:
        _remove_passing(folder)
    return swept


def remove_session(folder: Path) -> None:
    """Removes what a session makes, and nothing else; by whoever holds its lock, or sweeps it."""
    with contextlib.suppress(OSError):
        remove_doorbells(folder)
        _remove_sockets(folder, _STATS)
        _remove_page(folder)
        if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
            # The name is free from here on, however this ends.
            passing = _passing(folder.parent)
            folder.rename(passing)
            _remove_passing(passing, by_owner=True)
        else:
            (folder / LOCK_FILE).unlink()


def remove_doorbells(folder: Path) -> None:
    """libzmq leaves the file of a socket whose process was killed."""
    _remove_sockets(folder, _DOORBELL)


def _remove_sockets(folder: Path, name: re.Pattern[str]) -> None:
    with contextlib.suppress(OSError), opened_own_folder(folder) as fd:
        for entry in os.scandir(fd):
            if name.fullmatch(entry.name) and stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
                os.unlink(entry.name, dir_fd=fd)


def _remove_page(folder: Path) -> None:
    with contextlib.suppress(OSError), opened_own_folder(folder) as fd:
        if stat.S_ISREG(os.stat(PAGE_FILE, dir_fd=fd, follow_symlinks=False).st_mode):
            os.unlink(PAGE_FILE, dir_fd=fd)


def _remove_passing(folder: Path, *, by_owner: bool = False) -> None:
    """Removes a session on its way in or out, unless another process is about to do so."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileNotFoundError), opened_own_folder(folder) as folder_fd:
            fd = open_own(LOCK_FILE, dir_fd=folder_fd, most_bytes=_MAX_LOCK_BYTES)
            try:
                if not by_owner and not try_lock(fd, fcntl.LOCK_SH):
                    return
            finally:
                os.close(fd)
            os.unlink(LOCK_FILE, dir_fd=folder_fd)
        folder.rmdir()
