"""Sessions: a name belongs to one live process, and nothing of a dead one stays."""

import fcntl
import json
import os
import secrets
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from tsqp_shm.config import Limits
from tsqp_shm.errors import ArenaError, ArenaNotReady, ConfigError, SessionBusy, SessionFolderError, TsqpError
from tsqp_shm.shm import session as session_module
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.session import (
    SESSION_FILE,
    Invitation,
    Session,
    arena_name,
    sessions_folder,
    sweep_dead_sessions,
    wait_for_invitation,
)

PLAN = Plan.of_slots([("x", "float32", 1, 1)])
LIMITS = Limits(
    dtype="bfloat16", max_model_len=100, max_num_seqs=3, max_batch_tokens=70, tile_rows=16, tiles_in_flight=2
)
BAD_NAMES = [".hidden", "..", "a/b", "/a", "a b", "-x", "_x", "é", "a\n", "a\0b", "x" * 41]


@pytest.fixture
def name():
    return f"t-{secrets.token_hex(4)}"


def invitation(name: str, **fields) -> Invitation:
    values = {
        "arena": arena_name(name),
        "endpoint": "ipc:///tmp/bell",
        "doorbell": "adaptive",
        "spin_us": 20,
        "yield_us": 2000,
        "limits": LIMITS,
        "geometry": {"num_layers": 2, "windows": [None, 32]},
        "tee_pid": os.getpid(),
    }
    return Invitation(**{**values, **fields})


def arena_file(name: str) -> Path:
    return Path("/dev/shm" + arena_name(name))


def ignore(line: str) -> None:
    pass


@pytest.fixture
def live_elsewhere(held_elsewhere):
    """Begins a session, arena and invitation included, in a child that lives until it is killed."""

    def begin(name):
        session = Session.begin(name)
        arena = Arena.create(session.arena_name, PLAN, 1)
        arena.publish()
        session.invite(invitation(name))
        return session, arena

    return lambda name: held_elsewhere(lambda: begin(name))


def test_a_session_that_ends_leaves_nothing(name):
    with Session.begin(name) as session:
        session.invite(invitation(name))
        assert session.folder.stat().st_mode & 0o777 == 0o700
    assert not session.folder.exists()


def test_an_arena_that_nobody_closed_ends_with_its_session(name):
    with Session.begin(name) as session:
        arena = session.create_arena(PLAN, 1)
        file = Path("/dev/shm") / session.arena_name.removeprefix("/")
        assert file.exists()
    assert not file.exists()
    arena.close()


def test_an_arena_of_somebody_else_outlives_a_session_of_the_same_name(name):
    with Arena.create(arena_name(name), PLAN, 1), Session.begin(name) as session:
        with pytest.raises(ArenaError, match="not by this session"):
            session.create_arena(PLAN, 2)
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
        assert not (session.folder / SESSION_FILE).exists()
        assert (session.folder.parent / name).exists() == (which == "the same name")


def test_sweeping_names_what_it_removed(name, live_elsewhere):
    live_elsewhere(name).kill()
    assert sweep_dead_sessions() == [name]
    assert sweep_dead_sessions() == []


def test_live_sessions_of_others_are_not_swept(name, live_elsewhere):
    live_elsewhere(name)
    with Session.begin():
        assert sweep_dead_sessions() == []
        assert arena_file(name).exists()
        assert wait_for_invitation(name, 0.0, ignore).arena == arena_name(name)


def test_a_folder_without_a_lock_is_swept(name):
    (sessions_folder() / name).mkdir()
    assert sweep_dead_sessions() == [name]


def test_an_invitation_is_read_back_as_it_was_written(name):
    with Session.begin(name) as session:
        session.invite(invitation(name, spin_us=7))
        assert wait_for_invitation(name, 0.0, ignore) == invitation(name, spin_us=7)
        assert sorted(path.name for path in session.folder.iterdir()) == ["lock", SESSION_FILE]


def test_an_invitation_that_is_there_is_taken_without_a_word(name):
    said = []
    with Session.begin(name) as session:
        session.invite(invitation(name))
        wait_for_invitation(name, 60.0, said.append)
    assert said == []


def test_whoever_waits_for_an_invitation_is_told_once(name, forked):
    told, tell = os.pipe()

    def join():
        said = []

        def notify(line):
            said.append(line)
            os.write(tell, b"x")

        assert wait_for_invitation(name, 30.0, notify) == invitation(name, tee_pid=1)
        assert len(said) == 1
        assert name in said[0]

    child = forked(join)
    os.read(told, 1)
    with Session.begin(name) as session:
        session.invite(invitation(name, tee_pid=1))
        child.join()
    os.close(told)
    os.close(tell)


def test_waiting_in_vain_ends_with_the_command_to_run(name):
    with pytest.raises(ArenaNotReady, match=f"tsqp-shm tee MODEL --session {name}"):
        wait_for_invitation(name, 0.05, ignore)


@pytest.mark.parametrize(
    "fields",
    [
        {"doorbell": "loud"},
        {"doorbell": None},
        {"endpoint": 7},
        {"endpoint": "tcp://192.168.0.1:80"},
        {"endpoint": "ipc:///tmp/\udc80"},
        {"arena": ["/a"]},
        {"spin_us": "2"},
        {"yield_us": -1},
        {"geometry": []},
        {"limits": {}},
        {"limits": None},
        {"tee_pid": 1.5},
        {"more": 1},
    ],
)
def test_an_invitation_with_a_field_that_is_not_allowed_is_one_clear_error(name, fields):
    written = json.loads(json.dumps(asdict(invitation(name))))
    with pytest.raises(TsqpError, match="cannot be read; do both run the same version"):
        Invitation.parse(json.dumps({**written, **fields}).encode())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000, b"7", b"[[1, 2]]", b"1" * 5000])
def test_an_invitation_that_is_no_json_object_is_one_clear_error(name, content):
    with Session.begin(name) as session:
        (session.folder / SESSION_FILE).write_bytes(content)
        with pytest.raises(TsqpError, match="cannot be read; do both run the same version"):
            wait_for_invitation(name, 0.0, ignore)


def test_a_session_that_is_not_published_is_waited_for(name):
    with Session.begin(name), pytest.raises(ArenaNotReady):
        wait_for_invitation(name, 0.05, ignore)


def test_the_invitation_of_a_dead_session_is_not_taken(name, live_elsewhere):
    live_elsewhere(name).kill()
    with pytest.raises(ArenaNotReady):
        wait_for_invitation(name, 0.05, ignore)


def test_a_session_is_looked_at_only_while_none_begins_or_ends(name, monkeypatch):
    """A look takes the session's lock for a moment, and would be in the way of a process that begins it."""
    looked = []

    def is_dead(folder):
        with (folder.parent / ".lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        looked.append(folder.name)
        return True

    monkeypatch.setattr(session_module, "_is_dead", is_dead)
    with pytest.raises(ArenaNotReady):
        wait_for_invitation(name, 0.0, ignore)
    assert looked[0] == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_malformed_name_is_refused(name):
    with pytest.raises(ConfigError, match="session"):
        Session.begin(name)
    with pytest.raises(ConfigError, match="session"):
        wait_for_invitation(name, 0.0, ignore)


@pytest.fixture
def root(tmp_path, monkeypatch):
    root = tmp_path / "sessions"
    monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(root))
    return root


def test_the_folder_of_sessions_is_made_for_its_user_alone(root):
    assert sessions_folder() == root
    assert root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_may_enter_is_refused(root, mode):
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(ConfigError, match="mode 0700"):
        sessions_folder()


def test_a_folder_that_is_a_link_is_refused(root, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="mode 0700"):
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


def test_what_no_session_made_is_not_swept(runtime_folder):
    photos = sessions_folder() / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_bytes(b"x")
    link = sessions_folder() / "link"
    link.symlink_to(photos)
    try:
        assert sweep_dead_sessions() == []
        assert (photos / "one.jpg").exists()
    finally:
        link.unlink()
        (photos / "one.jpg").unlink()
        photos.rmdir()


def test_a_lock_that_is_a_pipe_or_a_link_is_refused(name, tmp_path):
    folder = sessions_folder() / name
    folder.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / "lock").symlink_to(victim)
    try:
        with pytest.raises(SessionFolderError, match="lock"):
            Session.begin(name)
        assert victim.read_text() == "mine"
    finally:
        (folder / "lock").unlink()
        folder.rmdir()
