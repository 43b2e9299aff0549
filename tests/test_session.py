"""Sessions: a name belongs to one live process, and nothing of a dead one stays."""

import os
import secrets
import shutil
import signal
from contextlib import closing
from pathlib import Path

import pytest
from arenas import arena_of, new_arena
from endpoints import listen_at

from tsqp_shm.errors import ArenaError, ConfigError, SessionBusy, SessionFolderError
from tsqp_shm.shm import layout
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.folder import SOCKET_FILE, list_sessions, sessions_folder, sweep_dead_sessions
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.transport import PosixTransport

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
PLAN = Plan.of_slots([("x", "float32", 1, 1)])
BAD_NAMES = [".hidden", "..", "a/b", "/a", "a b", "-x", "_x", "é", "a\n", "a\0b", "x" * 41]


@pytest.fixture
def name():
    return f"t-{secrets.token_hex(4)}"


def arena_file(name: str) -> Path:
    return Path("/dev/shm" + arena_name(name))


@pytest.fixture
def live_elsewhere(held_elsewhere):
    """Begins a session with an arena in a child that lives until it is killed."""

    def begin(name):
        session = Session.begin(name)
        arena = arena_of(session, PLAN)
        arena.publish()
        return session, arena

    return lambda name: held_elsewhere(lambda: begin(name))


def test_a_session_that_ends_leaves_nothing(name):
    with Session.begin(name) as session:
        assert session.folder.stat().st_mode & 0o777 == 0o700
    assert not session.folder.exists()


def test_an_arena_that_nobody_closed_ends_with_its_session(name):
    with Session.begin(name) as session:
        arena = arena_of(session, PLAN)
        file = Path("/dev/shm") / session.arena_name.removeprefix("/")
        assert file.exists()
    assert not file.exists()
    arena.close()


def test_an_arena_of_somebody_else_outlives_a_session_of_the_same_name(name):
    with new_arena(PLAN, arena_name(name)), Session.begin(name) as session:
        with pytest.raises(ArenaError, match="not by this session"):
            arena_of(session, PLAN)
        session.end()
        assert (Path("/dev/shm") / session.arena_name.removeprefix("/")).exists()


def test_ending_twice_does_nothing(name):
    session = Session.begin(name)
    session.end()
    with Session.begin(name) as again:
        session.end()
        assert again.folder.exists()


def test_a_session_without_a_name_gets_one_of_its_own():
    with Session.begin() as first, Session.begin() as second:
        assert first.name != second.name


def test_a_fork_of_the_owner_does_not_hold_the_session_for_it(name, forked):
    begun, tell = os.pipe()

    def begin_and_fork():
        session = Session.begin(name)
        # The fork tells, once it has let go; it lives on when its parent is killed.
        if os.fork() == 0:
            session.end()
            os.write(tell, f"{os.getpid()}\n".encode())
        signal.pause()

    child = forked(begin_and_fork)
    with os.fdopen(begun) as pipe:
        orphan = int(pipe.readline())
    try:
        assert sweep_dead_sessions() == []
        child.kill()
        assert sweep_dead_sessions() == [name]
    finally:
        os.close(tell)
        os.kill(orphan, signal.SIGKILL)


def test_a_name_in_use_is_refused_with_its_owner(name, live_elsewhere):
    child = live_elsewhere(name)
    with pytest.raises(SessionBusy) as caught:
        Session.begin(name)
    assert (caught.value.session, caught.value.owner_pid) == (name, child.pid)
    assert f"pid {child.pid}" in str(caught.value)


def test_a_name_is_refused_within_one_process_too(name):
    with Session.begin(name), pytest.raises(SessionBusy):
        Session.begin(name)


@pytest.mark.parametrize("which", ["the same name", "another name"])
def test_a_killed_session_is_swept_when_the_next_begins(name, live_elsewhere, which):
    live_elsewhere(name).kill()
    assert arena_file(name).exists()
    with Session.begin(name if which == "the same name" else None) as session:
        assert not arena_file(name).exists()
        assert (session.folder.parent / name).exists() == (which == "the same name")


def test_a_session_whose_folder_somebody_has_removed_leaves_that_of_its_successor(name):
    with Session.begin(name) as first:
        shutil.rmtree(first.folder)
        with Session.begin(name) as second:
            socket = second.folder / SOCKET_FILE
            with closing(listen_at(f"ipc://{socket}")):
                first.create_memory(layout.SLOTS_OFFSET_BYTES).close()
                assert socket.exists()
                first.end()
                assert {found.name: found.is_alive for found in list_sessions()}[name]
                assert socket.exists()


def test_sweeping_names_what_it_removed(name, live_elsewhere):
    live_elsewhere(name).kill()
    assert sweep_dead_sessions() == [name]
    assert sweep_dead_sessions() == []


def test_live_sessions_of_others_are_not_swept(name, live_elsewhere):
    live_elsewhere(name)
    with Session.begin():
        assert sweep_dead_sessions() == []
        assert arena_file(name).exists()
        assert {found.name: found.is_alive for found in list_sessions()}[name]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_malformed_name_is_refused(name):
    with pytest.raises(ConfigError, match="session"):
        Session.begin(name)
    with pytest.raises(ConfigError, match="session"):
        PosixTransport(name).join(0.0, len)


@pytest.fixture
def root(tmp_path, monkeypatch):
    root = tmp_path / "sessions"
    monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(root))
    return root


def test_the_folder_of_sessions_is_made_for_its_user_alone(root):
    assert sessions_folder() == root / "tsqp-shm"
    assert sessions_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_may_enter_is_refused(root, mode):
    (root / "tsqp-shm").mkdir(parents=True)
    (root / "tsqp-shm").chmod(mode)
    with pytest.raises(ConfigError, match="mode 0700"):
        sessions_folder()


def test_a_folder_that_is_a_link_is_refused(root, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.mkdir()
    (root / "tsqp-shm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="mode 0700"):
        sessions_folder()


@pytest.mark.parametrize("is_sticky", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_folder_below_one_in_which_others_may_put_another_is_refused(root, monkeypatch, depth, is_sticky):
    (root / "a" / "b").mkdir(parents=True)
    monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(root / "a" / "b"))
    around = (root / "a" / "b", root / "a", root)[depth - 1]
    around.chmod(0o1777 if is_sticky else 0o777)
    if is_sticky:
        assert sessions_folder() == root / "a" / "b" / "tsqp-shm"
    else:
        with pytest.raises(ConfigError, match=f"put another in the place of.*{around} is of user"):
            sessions_folder()


@needs_root
@pytest.mark.parametrize("what", ["folder", "link", "link on the way", "folder around a link"])
def test_a_folder_that_another_user_may_lead_elsewhere_is_refused(root, tmp_path, monkeypatch, what):
    """Of whoever owns a folder or a link, and not only of the last one."""
    (tmp_path / "true" / "b").mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "link").symlink_to(tmp_path / "true")
    root.symlink_to(Path("theirs") / "link" if what == "folder around a link" else tmp_path / "true")
    owned = {"folder": tmp_path / "true", "folder around a link": tmp_path / "theirs"}.get(what, root)
    monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(root / "b" if what == "link on the way" else root))
    sessions_folder()
    os.chown(owned, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(ConfigError, match=f"put another in the place of.*{owned} is of user {NOBODY}"):
        sessions_folder()


def test_a_folder_of_another_user_is_refused(root, monkeypatch):
    root.mkdir(mode=0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(ConfigError, match=f"user {me + 1}"):
        sessions_folder()


def test_a_folder_that_cannot_be_made_is_one_clear_error(root):
    root.write_text("a file")
    with pytest.raises(SessionFolderError, match="cannot be used"):
        sessions_folder()


def test_the_folder_follows_the_users_runtime_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TSQP_SHM_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert sessions_folder() == tmp_path / "tsqp-shm"
