"""`ps` and `clean`: what there is, and nothing that lives is removed."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
from pathlib import Path

import pytest
from arenas import arena_of, new_arena

from tsqp_shm.sessions import Survey, clean_sessions, print_sessions
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.folder import sessions_folder
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.shm.posix.session import Session

NOBODY = 65534
PR_SET_DUMPABLE = 4
PLAN = Plan.of_slots([("x", "float32", 100, 300)])


@pytest.fixture
def name() -> str:
    return f"t-{secrets.token_hex(4)}"


@pytest.fixture
def begin_elsewhere(held_elsewhere):
    """Begins a session with an arena in a child that lives until it is killed."""

    def begin(name):
        session = Session.begin(name, sweeps=False)
        arena = arena_of(session, PLAN)
        arena.publish()
        return session, arena

    return lambda name: held_elsewhere(lambda: begin(name))


def arena_file(name: str) -> Path:
    return Path("/dev/shm" + arena_name(name))


def test_a_live_session_is_listed_with_its_arena_and_processes(name, begin_elsewhere):
    child = begin_elsewhere(name)
    (session,) = Survey.take().sessions
    assert (session.name, session.is_alive, session.arena_bytes) == (name, True, PLAN.total_bytes)
    assert (session.tee_pid, session.pids) == (child.pid, [child.pid])
    assert session.age_s >= 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_processes_of_other_users_are_not_looked_at(name, held_elsewhere):
    with Session.begin(name, sweeps=False) as session, arena_of(session, PLAN) as arena:

        def become_nobody():
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            # Else what /proc has of it would be root's, as of one that a program may have left secrets to.
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)
            return arena

        held_elsewhere(become_nobody)
        (listed,) = Survey.take().sessions
        assert listed.pids == [os.getpid()]


def test_a_dead_session_is_listed_as_dead_and_stays_until_it_is_cleaned(name, begin_elsewhere):
    begin_elsewhere(name).kill()
    for _ in range(2):
        (session,) = Survey.take().sessions
        assert (session.is_alive, session.arena_bytes, session.pids) == (False, PLAN.total_bytes, [])


def test_clean_removes_the_dead_and_leaves_the_living(name, begin_elsewhere, capsys):
    living, dead = f"{name}-living", f"{name}-dead"
    begin_elsewhere(living)
    begin_elsewhere(dead).kill()
    assert clean_sessions(dry_run=False) == 0
    assert capsys.readouterr().out == f"removed {dead}\n"
    assert arena_file(living).exists()
    assert (sessions_folder() / living).exists()
    assert not arena_file(dead).exists()
    assert not (sessions_folder() / dead).exists()


def test_a_dry_run_removes_nothing(name, begin_elsewhere, capsys):
    begin_elsewhere(name).kill()
    assert clean_sessions(dry_run=True) == 0
    assert capsys.readouterr().out == f"would remove {name}\n"
    assert arena_file(name).exists()
    assert (sessions_folder() / name).exists()


def test_clean_with_nothing_to_do_says_so(capsys):
    assert clean_sessions(dry_run=False) == 0
    assert capsys.readouterr().out == "no dead sessions\n"


def test_an_arena_of_no_session_here_is_shown_and_never_removed(name, capsys):
    with new_arena(PLAN, arena_name(name)):
        stray = arena_name(name).removeprefix("/")
        assert Survey.take().stray_arenas[stray] == PLAN.total_bytes
        clean_sessions(dry_run=False)
        assert arena_file(name).exists()
        capsys.readouterr()
        print_sessions(json_output=False)
        assert stray in capsys.readouterr().out


def test_the_table_and_the_json_name_every_session(name, begin_elsewhere, capsys):
    living, dead = f"{name}-living", f"{name}-dead"
    child = begin_elsewhere(living)
    begin_elsewhere(dead).kill()
    print_sessions(json_output=False)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows[living][1] == "alive"
    assert rows[living][-1] == str(child.pid)
    assert rows[dead][1] == "dead"
    print_sessions(json_output=True)
    document = json.loads(capsys.readouterr().out)
    assert {session["name"]: session["is_alive"] for session in document["sessions"]} == {living: True, dead: False}


def test_nothing_is_listed_where_there_is_nothing(capsys):
    print_sessions(json_output=False)
    # Other programs of this user may have arenas meanwhile.
    assert capsys.readouterr().out.startswith("no sessions\n")
