"""What lies under our names and is not ours is neither waited for, followed, believed nor removed."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
from contextlib import closing, suppress
from pathlib import Path

import pytest
from arenas import arena_of, attach_arena, new_arena
from commands import assert_one_line, run

from tsqp_shm.doctor.sessions import examine_sessions
from tsqp_shm.errors import ArenaError, ArenaNotReady, ProtocolError, SessionFolderError
from tsqp_shm.files import ForeignFile, open_own
from tsqp_shm.sessions import Survey, clean_sessions, print_sessions
from tsqp_shm.shm import layout
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.folder import list_sessions, sessions_folder, sweep_dead_sessions, swept_afterwards
from tsqp_shm.shm.posix.memory import PosixMemory
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.transport import PosixTransport

PLAN = Plan.of_slots([("x", "float32", 100, 300)])
NOBODY = 65534


@pytest.fixture
def name() -> str:
    return f"t-{secrets.token_hex(4)}"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder of the user's own, with things in it, that TSQP_SHM_RUNTIME_DIR names."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(home))
    return home


def file_of(session: str) -> Path:
    return Path("/dev/shm" + arena_name(session))


def lay_pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def lay_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def lay_folder(path: Path) -> None:
    path.mkdir()


def lay_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


FOREIGN = {"pipe": lay_pipe, "link": lay_link, "folder": lay_folder, "socket": lay_socket}


@pytest.fixture(params=FOREIGN)
def lay(request):
    """Puts something under a name that is no regular file; it is gone after the test."""
    laid = []

    def put(path: Path) -> None:
        FOREIGN[request.param](path)
        laid.append(path)

    yield put
    for path in laid:
        with suppress(FileNotFoundError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_nothing_but_a_regular_file_is_opened(lay, tmp_path):
    lay(tmp_path / "laid")
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT):
        with pytest.raises(OSError, match="laid"):
            open_own(tmp_path / "laid", flags)


def test_what_holds_more_than_it_may_is_not_opened(tmp_path):
    (tmp_path / "large").write_bytes(bytes(65))
    os.close(open_own(tmp_path / "large", most_bytes=65))
    with pytest.raises(ForeignFile, match="65"):
        open_own(tmp_path / "large", most_bytes=64)


# The lock of the sessions' folder.


@pytest.fixture
def locked_elsewhere(held_elsewhere):
    """Another process of this user that holds it, and does not let go."""

    def hold():
        fd = os.open(sessions_folder() / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    return held_elsewhere(hold)


def test_a_lock_that_somebody_keeps_is_one_error_that_names_folder_and_holder(name, locked_elsewhere):
    with pytest.raises(SessionFolderError) as caught:
        Session.begin(name)
    assert str(sessions_folder() / ".lock") in str(caught.value)
    assert f"process {locked_elsewhere.pid} (" in str(caught.value)
    locked_elsewhere.kill()
    Session.begin(name).end()


def test_a_session_ends_and_is_seen_while_somebody_keeps_the_lock(name, held_elsewhere):
    session = Session.begin(name)
    held_elsewhere(lambda: open_and_lock(sessions_folder() / ".lock"))
    arena = arena_of(session, PLAN)
    assert [found.is_alive for found in list_sessions()] == [True]
    assert [listed.name for listed in Survey.take().sessions] == [name]
    session.end()
    assert not session.folder.exists()
    assert not file_of(name).exists()
    arena.close()


def open_and_lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


@pytest.mark.usefixtures("locked_elsewhere")
def test_where_the_end_cannot_sweep_its_own_error_comes_first():
    def fail():
        with swept_afterwards():
            raise ProtocolError("status", "0 to 2", 7)

    with pytest.raises(ProtocolError, match=r"^protocol error .* found 7; what dead .*\.lock: locked"):
        fail()


def test_a_lock_that_is_no_file_is_one_error(lay, home, name):
    sessions_folder()
    lay(home / "tsqp-shm" / ".lock")
    with pytest.raises(SessionFolderError, match=r"\.lock"):
        Session.begin(name)
    assert list_sessions() == []


# What is removed.


def test_a_home_that_sessions_lie_in_keeps_everything_else(home, name):
    """Empty folders, one that looks like an old session, links, files: beside our folder and in it."""
    for around in (home, sessions_folder()):
        (around / "empty").mkdir()
        (around / "app").mkdir()
        (around / "app" / "lock").touch()
        (around / "link").symlink_to(home / "empty")
        (around / "note").write_text("mine")
    before = sorted(home.rglob("*"))
    Session.begin(name).end()
    clean_sessions(dry_run=False)
    assert sorted(path for path in home.rglob("*") if path.name != ".lock") == before


@pytest.mark.parametrize("lies", ["an empty folder", "a folder with a lock", "a file", "a link to a session"])
def test_a_name_that_no_session_has_made_is_not_taken_over(home, name, lies, held_elsewhere):
    path = sessions_folder() / name
    if lies == "a file":
        path.write_text("mine")
    elif lies == "a link to a session":
        held_elsewhere(lambda: Session.begin("another"))
        path.symlink_to(sessions_folder() / "another")
    else:
        path.mkdir()
    if lies == "a folder with a lock":
        (path / "lock").touch()
    with pytest.raises(SessionFolderError, match="no session has made"):
        Session.begin(name)
    assert os.path.lexists(path)
    assert name not in [found.name for found in list_sessions()]


def test_a_lock_within_a_session_that_is_no_file_makes_it_none(lay, home, name):
    (sessions_folder() / name).mkdir(mode=0o700)
    lay(sessions_folder() / name / "lock")
    assert list_sessions() == []
    with pytest.raises(SessionFolderError, match="no session has made"):
        Session.begin(name)


def test_what_somebody_put_into_a_dead_sessions_folder_stays(home, name, held_elsewhere):
    held_elsewhere(lambda: Session.begin(name)).kill()
    (sessions_folder() / name / "thesis.txt").write_text("mine")
    assert sweep_dead_sessions() == [name]
    assert [path.name for path in (sessions_folder() / name).iterdir()] == ["thesis.txt"]


def test_a_session_that_was_killed_on_its_way_in_or_out_is_swept(home, held_elsewhere):
    empty, locked, held, foreign = (sessions_folder() / f".passing-{digit * 16}" for digit in "0123")
    for folder in (empty, locked, held, foreign):
        folder.mkdir(mode=0o700)
    (locked / "lock").touch(mode=0o600)
    (held / "lock").touch(mode=0o600)
    (foreign / "note").touch()
    ending = held_elsewhere(lambda: open_and_lock(held / "lock"))
    sweep_dead_sessions()
    assert sorted(sessions_folder().glob(".passing-*")) == [held, foreign]
    ending.kill()
    sweep_dead_sessions()
    assert sorted(sessions_folder().glob(".passing-*")) == [foreign]


def test_a_dead_session_of_one_folder_leaves_the_live_one_of_another_its_arena(
    name, tmp_path, monkeypatch, held_elsewhere
):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir(mode=0o700)
    monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(tmp_path / "one"))
    dead = held_elsewhere(lambda: Session.begin(name))
    monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(tmp_path / "other"))
    with Session.begin(name) as session, arena_of(session, PLAN):
        monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(tmp_path / "one"))
        dead.kill()
        assert sweep_dead_sessions() == [name]
        assert file_of(name).exists()
        monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(tmp_path / "other"))
        assert [found.is_alive for found in list_sessions()] == [True]
    assert not file_of(name).exists()


def test_a_fork_of_the_owner_does_not_keep_its_arena_from_the_sweep(name, forked):
    begun, tell = os.pipe()

    def begin_and_fork():
        session = Session.begin(name)
        arena = arena_of(session, PLAN)
        if os.fork() == 0:
            # With everything that it has inherited, and nothing of it its own.
            arena.close()
            session.end()
            os.write(tell, f"{os.getpid()}\n".encode())
        signal.pause()

    child = forked(begin_and_fork)
    with os.fdopen(begun) as pipe:
        orphan = int(pipe.readline())
    try:
        assert file_of(name).exists()
        child.kill()
        assert sweep_dead_sessions() == [name]
        assert not file_of(name).exists()
    finally:
        os.close(tell)
        os.kill(orphan, signal.SIGKILL)


# The arena's name, and what becomes of it while the arena is made.


def test_a_name_that_is_taken_meanwhile_is_one_error_and_stays_the_takers(lay, name):
    with Session.begin(name) as session:
        lay(file_of(name))
        with pytest.raises(ArenaError, match="exists already"):
            session.create_memory(PLAN.total_bytes)
        session.end()
        assert os.path.lexists(file_of(name))


def test_a_name_that_is_taken_before_a_restart_is_one_error(name):
    with Session.begin(name) as session:
        arena_of(session, PLAN).close()
        with new_arena(PLAN, arena_name(name)):
            with pytest.raises(ArenaError, match="exists already"):
                session.create_memory(PLAN.total_bytes)
            session.end()
            assert file_of(name).exists()


def shrink(path: Path) -> None:
    os.truncate(path, 0)


def shrink_late(path: Path) -> None:
    os.truncate(path, layout.SLOTS_OFFSET_BYTES)


def grow(path: Path) -> None:
    os.truncate(path, 2 * PLAN.total_bytes)


def unlink(path: Path) -> None:
    path.unlink()


def rename_over(path: Path) -> None:
    other = path.with_name(f"{path.name}-other")
    other.write_text("mine")
    other.replace(path)


def replaced_by(lay_there):
    def change(path: Path) -> None:
        path.unlink()
        lay_there(path)

    return change


CHANGES = {
    "shrink": shrink, "shrink late": shrink_late, "grow": grow, "unlink": unlink, "rename": rename_over,
    "link": replaced_by(lay_link), "pipe": replaced_by(lay_pipe),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["backed", "mapped"])
def test_an_arena_that_changes_while_it_is_made_is_one_error(name, monkeypatch, change, moment):
    """By another process of this user; what that has put there is left alone."""
    back, lock_pages = os.posix_fallocate, PosixMemory.__init__

    def back_and_change(*arguments):
        back(*arguments)
        CHANGES[change](file_of(name))

    def map_and_change(*arguments):
        lock_pages(*arguments)
        CHANGES[change](file_of(name))

    if moment == "backed":
        monkeypatch.setattr(os, "posix_fallocate", back_and_change)
    else:
        monkeypatch.setattr(PosixMemory, "__init__", map_and_change)
    with Session.begin(name) as session:
        with pytest.raises(ArenaError, match="while it was made; another process"):
            session.create_memory(PLAN.total_bytes)
        session.end()
    is_theirs = change in ("rename", "link", "pipe")
    assert os.path.lexists(file_of(name)) == is_theirs
    if is_theirs:
        file_of(name).unlink()


def test_what_lies_under_an_arenas_name_and_is_none_is_refused_at_once(lay, name):
    """By who wants to join as by who only looks: neither waits for the writer of a pipe."""
    lay(file_of(name))
    with pytest.raises(ArenaError, match="cannot be opened") as caught:
        attach_arena(arena_name(name), PLAN)
    assert not isinstance(caught.value, ArenaNotReady)
    for look in (PosixTransport(name).glance, lambda: PosixTransport(name).join(30.0, len)):
        with pytest.raises(ArenaError, match="cannot be opened"):
            look()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")
def test_an_arena_that_another_user_laid_is_refused(name):
    file_of(name).touch(mode=0o600)
    os.chown(file_of(name), NOBODY, NOBODY)
    try:
        with pytest.raises(ArenaError, match=f"belongs to user {NOBODY}"):
            attach_arena(arena_name(name), PLAN)
        with Session.begin(name) as session, pytest.raises(ArenaError, match=f"belongs to user {NOBODY}"):
            session.create_memory(PLAN.total_bytes)
        assert file_of(name).exists()
    finally:
        file_of(name).unlink()


# Names that reach a terminal.

ESCAPES = "\x1b[2J\x1b]0;pwned\x07\n\udcff"


@pytest.fixture
def stray():
    path = file_of(f"stray{ESCAPES}{secrets.token_hex(4)}")
    path.write_bytes(b"x")
    yield
    path.unlink()


@pytest.mark.usefixtures("stray")
def test_a_name_of_shared_memory_does_not_steer_the_terminal(capsys):
    print_sessions(json_output=False)
    shown = capsys.readouterr().out
    assert r"stray\x1b[2J\x1b]0;pwned\x07\n\udcff" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    print_sessions(json_output=True)
    stray = [name for name in json.loads(capsys.readouterr().out)["stray_arenas"] if "pwned" in name]
    assert [name.isprintable() for name in stray] == [True]
    for finding in examine_sessions():
        assert finding.found.isprintable()


@pytest.mark.parametrize("words", [("trace", "out.json"), ("launch", "--session", "x", "--trace")])
def test_a_pipe_in_the_place_of_a_trace_is_not_waited_for(tmp_path, words):
    os.mkfifo(tmp_path / "pipe")
    assert_one_line(run(*words, tmp_path / "pipe"), 1 if words[0] == "trace" else 2, "trace")


def test_the_secret_of_a_session_is_for_those_who_may_open_its_arena(name):
    with Session.begin(name) as session, closing(session.create_memory(PLAN.total_bytes)) as memory:
        there = slice(layout.SECRET_OFFSET_BYTES, layout.SECRET_OFFSET_BYTES + layout.SECRET_BYTES)
        first = bytes(memory.buffer[there])
        assert file_of(name).stat().st_mode & 0o777 == 0o600
        memory.close()
        with closing(session.create_memory(PLAN.total_bytes)) as second:
            assert bytes(second.buffer[there]) != first != bytes(layout.SECRET_BYTES)
