"""The folder in which sessions meet, and what dead ones left."""

from __future__ import annotations

from collections.abc import Iterator

from tsqp_shm.doctor.finding import BAD, GOOD, WARNING, Finding, mib
from tsqp_shm.errors import ConfigError, SessionFolderError
from tsqp_shm.sessions import Survey


def examine_sessions() -> Iterator[Finding]:
    try:
        survey = Survey.take()
    except (ConfigError, SessionFolderError) as error:
        yield Finding("session folder", BAD, str(error), "no session can begin", "set TSQP_SHM_RUNTIME_DIR")
        return
    yield from _judge(survey)


def _judge(survey: Survey) -> Iterator[Finding]:
    live = [session.name for session in survey.sessions if session.is_alive]
    dead = [session for session in survey.sessions if not session.is_alive]
    found = f"{len(live)} alive" + (f" ({', '.join(live)})" if live else "")
    if dead:
        names = ", ".join(session.name for session in dead)
        held = mib(sum(session.arena_bytes for session in dead))
        why = f"their processes are dead, their arenas hold {held}; the next start removes them"
        yield Finding("sessions", WARNING, f"{found}, {len(dead)} dead ({names})", why, "tsqp-shm clean")
    else:
        yield Finding("sessions", GOOD, found)
    stray = survey.stray_arenas
    if stray:
        why = (
            f"{mib(sum(stray.values()))} of shared memory; they belong to sessions in another TSQP_SHM_RUNTIME_DIR, "
            "or to nobody"
        )
        names = ", ".join(f"/dev/shm/{name}" for name in stray)
        yield Finding("stray arenas", WARNING, names, why, "rm them, if no process uses them (fuser -v)")
