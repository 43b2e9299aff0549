"""A session: the name under which two processes find each other, and what must be gone when it ends.

    FOLDER/NAME/            mode 0700
        lock                held by the TEE process while it lives; the kernel lets go of it at any death
        session.json        written when the arena is published: how the GPU process attaches
        doorbell            the ZeroMQ socket, unless another endpoint was chosen; doorbell.2 that of a second arena

FOLDER is $TSQP_SHM_RUNTIME_DIR, else $XDG_RUNTIME_DIR/tsqp-shm, else /tmp/tsqp-shm-UID.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsqp_shm.config import (
    DOORBELLS,
    MAX_WAIT_US,
    SESSION_NAME,
    Limits,
    require_choice,
    require_endpoint,
    require_range,
    require_session_name,
)
from tsqp_shm.errors import ArenaError, ArenaNotReady, ConfigError, SessionBusy, SessionFolderError, TsqpError
from tsqp_shm.shm.arena import Arena, unlink_arena
from tsqp_shm.shm.plan import Plan

SESSION_FILE = "session.json"
LOCK_FILE = "lock"
PARTIAL_FILE = f"{SESSION_FILE}.partial"
SOCKET_FILE = "doorbell"
_SESSION_FILES = (PARTIAL_FILE, SESSION_FILE, LOCK_FILE)


def new_session_name() -> str:
    return f"s{os.getpid()}-{secrets.token_hex(3)}"


def arena_name(session: str) -> str:
    """The POSIX shared-memory name; it holds the user id, so users do not meet."""
    return f"/tsqp-shm-{os.geteuid()}-{session}"


@dataclass(frozen=True)
class Invitation:
    """What the TEE tells the GPU process through session.json; the TEE itself never reads it back.

    Attributes:
        arena: POSIX shared-memory name.
        endpoint: ZeroMQ address of the doorbell.
        doorbell: "adaptive", "zmq" or "spin".
        spin_us, yield_us: thresholds of the wait.
        limits: from which the GPU process derives its own plan.
        geometry: of the TEE's plan, so that a mismatch can be named.
        tee_pid: for display.
    """

    arena: str
    endpoint: str
    doorbell: str
    spin_us: int
    yield_us: int
    limits: Limits
    geometry: dict[str, Any]
    tee_pid: int

    def __post_init__(self) -> None:
        for field, kind in (("arena", str), ("endpoint", str), ("geometry", dict)):
            if not isinstance(getattr(self, field), kind):
                raise ConfigError(field, getattr(self, field), f"a {kind.__name__}")
        require_endpoint(self.endpoint)
        require_choice("doorbell", self.doorbell, DOORBELLS)
        require_range("spin_us", self.spin_us, 0, MAX_WAIT_US)
        require_range("yield_us", self.yield_us, 0, MAX_WAIT_US)
        require_range("tee_pid", self.tee_pid, 1, 1 << 31)

    @classmethod
    def parse(cls, content: bytes) -> Invitation:
        """Reads what `Session.invite` wrote.

        Raises:
            TsqpError: another version of this package wrote it, or something else did.
        """
        try:
            # UNTRUSTED: a broken TEE process must end in one clear line here; every field is checked when it is made.
            values = json.loads(content)
            return cls(**{**values, "limits": Limits(**values["limits"])})
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise TsqpError(
                f"{SESSION_FILE} of the TEE process cannot be read; do both run the same version of tsqp-shm? ({error})"
            ) from error


class Session:
    """The TEE's hold on a session's name; use `Session.begin`."""

    def __init__(self, name: str, folder: Path, lock_fd: int) -> None:
        self.name = name
        self.folder = folder
        self._lock_fd: int | None = lock_fd
        self._has_arena = False
        self._arenas = 0
        _begun.add(self)

    @classmethod
    def begin(cls, name: str | None = None, *, sweeps: bool = True) -> Session:
        """Sweeps dead sessions and takes a name.

        Args:
            sweeps: False leaves dead sessions as they are, to be looked at.

        Raises:
            SessionBusy: a live session has the name.
            ConfigError: the name is malformed.
            SessionFolderError: the folder is full or read-only.
        """
        name = name or new_session_name()
        require_session_name(name)
        root = sessions_folder()
        with _root_lock(root):
            if sweeps:
                _sweep(root)
            folder = root / name
            with _storing(folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            try:
                lock_fd = _try_lock(folder)
            except SessionFolderError:
                # If nothing is in it, it was made just now.
                with contextlib.suppress(OSError):
                    folder.rmdir()
                raise
            if lock_fd is None:
                raise SessionBusy(name, _owner_pid(folder))
            try:
                with _storing(folder / LOCK_FILE):
                    os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
            except SessionFolderError:
                _remove(folder)
                os.close(lock_fd)
                raise
        return cls(name, folder, lock_fd)

    @property
    def arena_name(self) -> str:
        return arena_name(self.name)

    @property
    def default_endpoint(self) -> str:
        """Of the arena made last: a GPU process that was only believed dead would come back to the socket it knows."""
        return f"ipc://{self.folder / SOCKET_FILE}" + (f".{self._arenas}" if self._arenas > 1 else "")

    def create_arena(self, plan: Plan, epoch: int) -> Arena:
        """`Arena.create` under this session's name; the session's end sees to it that none is left.

        A session has one arena at a time.

        Raises:
            ArenaError: as `Arena.create`.
        """
        # libzmq leaves the file of an earlier arena's socket.
        for socket in self.folder.glob(f"{SOCKET_FILE}*"):
            socket.unlink()
        self._has_arena = True
        self._arenas += 1
        try:
            return Arena.create(self.arena_name, plan, epoch)
        except ArenaError:
            # Nothing of this session's is left, and what has the name is somebody else's.
            self._has_arena = False
            raise

    def invite(self, invitation: Invitation) -> None:
        """Writes session.json, whole or not at all.

        Raises:
            SessionFolderError: the folder is full or read-only.
        """
        partial = self.folder / PARTIAL_FILE
        with _storing(partial):
            partial.write_text(json.dumps(asdict(invitation)))
            partial.rename(self.folder / SESSION_FILE)

    def end(self) -> None:
        """Removes the folder and lets go of the name. Ending twice does nothing."""
        if self._lock_fd is None:
            return
        with _root_lock(self.folder.parent):
            if self._has_arena:
                # As a rule it is gone by now; not if a signal came between its making and whoever was to close it.
                # Without the folder no sweep would find it.
                unlink_arena(self.arena_name)
            _remove(self.folder)
            os.close(self._lock_fd)
        self._lock_fd = None

    def _leave_to_parent(self) -> None:
        """In a forked child: the lock is the parent's alone, or the child would hold it for a parent that died."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        self._lock_fd = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


# What a fork has to let go of.
_begun: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork() -> None:
    for session in list(_begun):
        session._leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)


def wait_for_invitation(name: str, timeout_s: float, notify: Callable[[str], None]) -> Invitation:
    """The GPU process's way in: waits until the TEE of that session has published its arena.

    Args:
        notify: called once with a line that says what is waited for, if it is not there at once.

    Raises:
        ArenaNotReady: nobody began the session in time.
    """
    require_session_name(name)
    root = sessions_folder()
    folder = root / name
    deadline = time.monotonic() + timeout_s
    told = False
    while True:
        # Under the root lock no session begins or ends: the file belongs to whoever holds the session's lock, and this
        # look at that lock is not in the way of a TEE process that is about to take it.
        with contextlib.suppress(FileNotFoundError), _root_lock(root):
            if not _is_dead(folder):
                return Invitation.parse((folder / SESSION_FILE).read_bytes())
        if time.monotonic() > deadline:
            raise ArenaNotReady(
                arena_name(name),
                f"no TEE process began session {name!r} within {timeout_s:.0f} s; "
                f"start it with: tsqp-shm tee MODEL --session {name}",
            )
        if not told:
            notify(f"waiting up to {timeout_s:.0f} s for the TEE process of session {name!r}")
            told = True
        time.sleep(0.02)


def sweep_dead_sessions() -> list[str]:
    """Removes what sessions left behind whose TEE process is dead. Returns their names."""
    root = sessions_folder()
    with _root_lock(root):
        return _sweep(root)


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
    with _root_lock(root):
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
    with _storing(root):
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
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SessionFolderError(path, error.strerror or str(error)) from error


@contextlib.contextmanager
def _root_lock(root: Path) -> Iterator[None]:
    """Held while a session begins, ends or is swept, so that none is swept between its folder and its lock."""
    with _storing(root / ".lock"):
        fd = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _try_lock(folder: Path) -> int | None:
    with _storing(folder / LOCK_FILE):
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


def _owner_pid(folder: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        fd = _open_lock(folder, os.O_RDONLY)
        try:
            return int(os.read(fd, 32))
        finally:
            os.close(fd)
    return None


def _sessions(root: Path) -> Iterator[FoundSession]:
    for folder in sorted(root.iterdir()):
        if _is_session(folder):
            yield FoundSession(folder.name, folder, not _is_dead(folder), _owner_pid(folder))


def _sweep(root: Path) -> list[str]:
    swept = []
    for session in _sessions(root):
        if not session.is_alive:
            unlink_arena(arena_name(session.name))
            _remove(session.folder)
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
    return path.name in _SESSION_FILES or path.is_socket()


def _remove(folder: Path) -> None:
    """Removes what a session makes, the lock last, and nothing else."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK_FILE):
            if _is_of_a_session(path):
                path.unlink()
        folder.rmdir()
