"""What sessions there are: their age, memory and processes; `tsqp-shm ps` and `tsqp-shm clean`."""

from __future__ import annotations

import contextlib
import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from tsqp_shm.errors import TsqpError
from tsqp_shm.printable import print_json, shown
from tsqp_shm.shm.observer import invitation_of
from tsqp_shm.shm.posix.folder import LOCK_FILE, FoundSession, list_sessions, sweep_dead_sessions
from tsqp_shm.shm.posix.objects import SHM_FOLDER, arena_name
from tsqp_shm.shm.posix.transport import PosixTransport


@dataclass(frozen=True)
class ListedSession:
    """One session of this user.

    Attributes:
        is_alive: whether its TEE process lives.
        mode: None if that cannot be told, or not yet.
        age_s: since it began; None if that cannot be told.
        arena_bytes: of shared memory it holds; 0 before its arena is made, and in a mode that has none.
        tee_pid: None if it did not get so far as to write it.
        pids: of this user's processes that map its arena, as far as this process may look; and of its TEE process where
            that lets nobody look.
    """

    name: str
    is_alive: bool
    mode: str | None
    age_s: float | None
    arena_bytes: int
    tee_pid: int | None
    pids: list[int]


@dataclass(frozen=True)
class Survey:
    """What there is of this user's.

    Attributes:
        sessions: live and dead ones, by name.
        stray_arenas: what has an arena's name and belongs to none of them, with its size in bytes; the name in
            printable characters. Sessions in another folder may have made it, or anybody, so nothing removes it.
    """

    sessions: list[ListedSession]
    stray_arenas: dict[str, int]

    @classmethod
    def take(cls) -> Survey:
        """Looks; nothing is changed.

        Raises:
            ConfigError, SessionFolderError: the folder of sessions cannot be used.
        """
        # Before the sessions, or the arena of one that begins meanwhile would seem to be nobody's.
        arenas = _arenas()
        found = list_sessions()
        users = _arena_users() if found else {}
        sessions = []
        for session in found:
            age_s = None
            with contextlib.suppress(OSError):
                # Written once, when the session began.
                age_s = max(0.0, time.time() - (session.folder / LOCK_FILE).lstat().st_mtime)
            arena = _object(session.name)
            sessions.append(
                ListedSession(
                    session.name,
                    session.is_alive,
                    _mode_of(session.name),
                    age_s,
                    _size_bytes(arena),
                    session.tee_pid,
                    _with_hidden_tee(session, users.get(arena, [])),
                )
            )
        known = {_object(session.name) for session in found}
        # One whose session has ended meanwhile is gone by now.
        stray = {
            shown(arena, lines=False): size for arena in arenas if arena not in known and (size := _size_bytes(arena))
        }
        return cls(sessions, stray)


def print_sessions(*, json_output: bool) -> int:
    """`tsqp-shm ps`. Returns the exit code."""
    survey = Survey.take()
    if json_output:
        print_json(asdict(survey))
        return 0
    if not survey.sessions:
        print("no sessions")
    else:
        width = max(len(name) for name in ["SESSION", *(session.name for session in survey.sessions)])
        print(f"{'SESSION':<{width}}  {'STATE':<7}{'MODE':<10}{'AGE':>6}{'ARENA':>14}  {'TEE':>8}  MAPPED BY")
    for session in survey.sessions:
        state = "alive" if session.is_alive else "dead"
        pids = " ".join(map(str, session.pids)) or "-"
        arena = f"{session.arena_bytes:,}" if session.arena_bytes else "-"
        print(
            f"{session.name:<{width}}  {state:<7}{session.mode or '-':<10}{_age(session.age_s):>6}"
            f"{arena:>14}  {session.tee_pid or '-':>8}  {pids}"
        )
    for name, size_bytes in survey.stray_arenas.items():
        print(f"{SHM_FOLDER}/{name}: {size_bytes:,} bytes, of no session in this folder")
    return 0


def clean_sessions(*, dry_run: bool) -> int:
    """`tsqp-shm clean`. Returns the exit code."""
    if dry_run:
        dead = [session.name for session in Survey.take().sessions if not session.is_alive]
    else:
        dead = sweep_dead_sessions()
    verb = "would remove" if dry_run else "removed"
    for name in dead:
        print(f"{verb} {name}")
    if not dead:
        print("no dead sessions")
    return 0


def _mode_of(session: str) -> str | None:
    try:
        # UNTRUSTED: whoever may write to the arena may have changed it; one of the modes, and for display only.
        with closing(PosixTransport(session).glance()) as glance:
            return invitation_of(session, glance).limits.mode
    except TsqpError:
        return None


def _object(session: str) -> str:
    """The name of a session's arena as it lies in /dev/shm."""
    return arena_name(session).removeprefix("/")


def _arenas() -> list[str]:
    try:
        # UNTRUSTED: any user may name an object like that.
        return sorted(path.name for path in Path(SHM_FOLDER).iterdir() if path.name.startswith(_object("")))
    except OSError:
        return []


def _size_bytes(arena: str) -> int:
    try:
        return Path(SHM_FOLDER, arena).lstat().st_size
    except OSError:
        return 0


def _arena_users() -> dict[str, list[int]]:
    """The pids that map each arena, of this user's processes: another's may keep a look at it waiting, and map nothing
    of ours. Those in other containers cannot be seen."""
    users: dict[str, list[int]] = {}
    prefix = f"{SHM_FOLDER}/{_object('')}"
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if process.stat().st_uid != os.geteuid():
                continue
            maps = (process / "maps").read_text(errors="replace")
        except OSError:
            continue
        # A mapping whose object was removed has " (deleted)" behind its path.
        paths = {words[5].split()[0] for line in maps.splitlines() if len(words := line.split(maxsplit=5)) == 6}
        for path in paths:
            if path.startswith(prefix):
                users.setdefault(path.removeprefix(f"{SHM_FOLDER}/"), []).append(int(process.name))
    return {name: sorted(pids) for name, pids in users.items()}


def _with_hidden_tee(session: FoundSession, pids: list[int]) -> list[int]:
    """A process that holds keys shows nobody what it maps (`hardening`), and belongs to root as far as /proc says. That
    of a live session is known by what it has written into the lock that it holds."""
    pid = session.tee_pid
    if not session.is_alive or pid is None or pid in pids or not _size_bytes(_object(session.name)):
        return pids
    try:
        with Path(f"/proc/{pid}/maps").open():
            return pids
    except PermissionError:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
                if line.startswith("Uid:") and int(line.split()[2]) == os.geteuid():
                    return sorted([*pids, pid])
    except OSError:
        pass
    return pids


def _age(age_s: float | None) -> str:
    if age_s is None:
        return "-"
    seconds = int(age_s)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
