"""The folder in which sessions lie: whose they are, which are dead, and what is removed of those.

    FOLDER/NAME/            mode 0700
        lock                held by the TEE process while it lives; the kernel lets go of it at any death
        doorbell            the ZeroMQ socket, unless another endpoint was chosen; doorbell.2 that of a second arena

FOLDER is $TSQP_SHM_RUNTIME_DIR, else $XDG_RUNTIME_DIR/tsqp-shm, else /tmp/tsqp-shm-UID.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tsqp_shm.config import SESSION_NAME
from tsqp_shm.errors import ConfigError, SessionFolderError
from tsqp_shm.shm.posix.memory import arena_name, unlink_arena

LOCK_FILE = "lock"


def sweep_dead_sessions() -> list[str]:
    """Removes what sessions left behind whose TEE process is dead. Returns their names."""
    root = sessions_folder()
    with root_lock(root):
        return sweep(root)


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
    """Every session of this user, live or dead, by name; nothing is changed."""
    root = sessions_folder()
    with root_lock(root):
        return list(_sessions(root))


def sessions_folder() -> Path:
    """The folder of this user's sessions, made with mode 0700.

    Raises:
        SessionFolderError: it cannot be made.
        ConfigError: it belongs to somebody else or others may write to it.
    """
    chosen = os.environ.get("TSQP_SHM_RUNTIME_DIR")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if chosen:
        root = Path(chosen)
    elif runtime:
        root = Path(runtime) / "tsqp-shm"
    else:
        root = Path(tempfile.gettempdir()) / f"tsqp-shm-{os.geteuid()}"
    with storing(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or mode & 0o077:
        kind = "" if stat.S_ISDIR(status.st_mode) else "no folder, "
        raise ConfigError(
            "session folder",
            str(root),
            f"a folder of user {os.geteuid()} with mode 0700 (it is {kind}of user {status.st_uid} with mode "
            f"{mode:04o}); chmod 700 it if it is yours, else set TSQP_SHM_RUNTIME_DIR",
        )
    return root


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SessionFolderError(path, error.strerror or str(error)) from error


@contextlib.contextmanager
def root_lock(root: Path) -> Iterator[None]:
    """Held while a session begins, ends or is swept, so that none is swept between its folder and its lock."""
    with storing(root / ".lock"):
        fd = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        # Not by closing alone: a child that was forked meanwhile holds the same open file.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def try_lock(folder: Path) -> int | None:
    with storing(folder / LOCK_FILE):
        fd = _open_lock(folder, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _open_lock(folder: Path, flags: int) -> int:
    # Neither a link nor a pipe that somebody laid there: the one would be written through, the other waited for.
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.open(folder / LOCK_FILE, flags, 0o600)


def _is_dead(folder: Path) -> bool:
    """Whether no process holds the session's lock."""
    try:
        fd = _open_lock(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    except OSError:
        # Not a lock of ours, so nothing of ours to remove.
        return False
    try:
        # Shared, so that two lookers do not take each other for the owner.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def owner_pid(folder: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        fd = _open_lock(folder, os.O_RDONLY)
        try:
            # UNTRUSTED: whatever process wrote it; shown, and nothing follows from it.
            return int(os.read(fd, 32))
        finally:
            os.close(fd)
    return None


def _sessions(root: Path) -> Iterator[FoundSession]:
    for folder in sorted(root.iterdir()):
        if _is_session(folder):
            yield FoundSession(folder.name, folder, not _is_dead(folder), owner_pid(folder))


def sweep(root: Path) -> list[str]:
    swept = []
    for session in _sessions(root):
        if not session.is_alive:
            unlink_arena(arena_name(session.name))
            remove_session(session.folder)
            swept.append(session.name)
    return swept


def _is_session(folder: Path) -> bool:
    """Whether this is a folder that a session made: the root may be a folder that holds other things too."""
    if folder.is_symlink() or not folder.is_dir() or not SESSION_NAME.fullmatch(folder.name):
        return False
    try:
        content = list(folder.iterdir())
    except OSError:
        # Gone meanwhile, or not to be read by this user.
        return False
    # One that was killed before it had its lock has nothing yet.
    return not content or ((folder / LOCK_FILE) in content and all(map(_is_of_a_session, content)))


def _is_of_a_session(path: Path) -> bool:
    return path.name == LOCK_FILE or path.is_socket()


def remove_session(folder: Path) -> None:
    """Removes what a session makes, the lock last, and nothing else."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK_FILE):
            if _is_of_a_session(path):
                path.unlink()
        folder.rmdir()
