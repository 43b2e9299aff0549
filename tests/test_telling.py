"""What a session tells over its socket: to its own user, at once, and to nobody who keeps it waiting."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tsqp_shm.shm.posix.folder import sessions_folder, sweep_dead_sessions
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.progress import MAX_STATS_BYTES, STATS_SOCKET, WITHHELD, Progress
from tsqp_shm.tee.telling import Telling
from tsqp_shm.top.told import Pads, Told, ask, tells

NOBODY = 65534
PADS = Pads(
    stock_rows=700,
    capacity_rows=4096,
    made=91_000,
    used=12_345,
    burned=6,
    pads_per_s=321.5,
    tee_products=42,
    fault=None,
)
WITHHELD_TOLD = dict.fromkeys(WITHHELD, 7)
FACTS = {"pads": PADS._asdict(), "withheld": WITHHELD_TOLD}


@pytest.fixture
def session() -> Iterator[Session]:
    with Session.begin() as session:
        yield session


@pytest.fixture
def told(session) -> Iterator[Telling]:
    with contextlib.closing(Telling(session.folder, lambda: FACTS)) as telling:
        assert telling.refusal == ""
        yield telling


def connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    connection.settimeout(10)
    return connection


def test_who_connects_gets_one_line_and_the_end(told):
    with connected(told.path) as connection, connection.makefile("rb") as lines:
        assert json.loads(lines.readline()) == FACTS
        assert lines.read() == b""
    assert ask(told.path.parent) == Told(PADS, WITHHELD_TOLD)


def test_the_socket_is_its_users_alone_whatever_the_mask(session):
    before = os.umask(0)
    try:
        with contextlib.closing(Telling(session.folder, lambda: FACTS)) as telling:
            status = telling.path.lstat()
    finally:
        os.umask(before)
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.geteuid())


@pytest.mark.skipif(os.geteuid() != 0, reason="root becomes another user")
def test_another_user_is_told_nothing(runtime_folder, forked, tmp_path_factory):
    """Not though he be let through to the socket: whose process it is the kernel says."""
    # Where another user may come, as no session's folder is.
    open_folder = tmp_path_factory.mktemp("open")
    for folder in (open_folder, *open_folder.parents[:3]):
        folder.chmod(0o755)

    def run():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with connected(open_folder / STATS_SOCKET) as connection:
            assert connection.recv(1) == b""
        # Nor is what another user says believed.
        assert ask(open_folder) is None

    with contextlib.closing(Telling(open_folder, lambda: FACTS)) as telling:
        telling.path.chmod(0o666)
        assert ask(open_folder) == Told(PADS, WITHHELD_TOLD)
        forked(run).join()


def test_who_never_reads_holds_nobody_up(told):
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(connected(told.path))
        assert ask(told.path.parent) == Told(PADS, WITHHELD_TOLD)
        began = threading.active_count()
        told.close()
        assert threading.active_count() == began - 1


def test_facts_that_cannot_be_told_end_one_connection_and_no_more(session):
    answers = iter([ValueError("not yet"), {"too long": "x" * MAX_STATS_BYTES}, FACTS])

    def facts():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with contextlib.closing(Telling(session.folder, facts)):
        assert [ask(session.folder) for _ in range(3)] == [None, None, Told(PADS, WITHHELD_TOLD)]


def test_it_is_gone_after_close_and_closing_twice_is_nothing(session, told):
    assert tells(session.folder)
    told.close()
    told.close()
    assert not tells(session.folder)
    assert ask(session.folder) is None


def test_another_arena_of_the_session_leaves_it_where_it_is(session, told):
    session.create_memory(1 << 16).close()
    assert ask(session.folder) == Told(PADS, WITHHELD_TOLD)


def test_a_killed_sessions_socket_is_swept_with_its_folder(forked):
    def run():
        session = Session.begin("killed")
        Telling(session.folder, lambda: FACTS)
        assert ask(session.folder) is not None
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(run).wait() == -signal.SIGKILL
    folder = sessions_folder() / "killed"
    assert tells(folder)
    assert ask(folder) is None
    assert sweep_dead_sessions() == ["killed"]
    assert not folder.exists()


def test_a_forked_child_keeps_nobody_waiting_for_its_parent(told, forked):
    ready, tell = os.pipe()

    def run():
        os.write(tell, b"x")
        signal.pause()

    child = forked(run)
    os.read(ready, 1)
    told.close()
    assert ask(told.path.parent) is None
    child.kill()


def test_a_folder_without_room_for_a_socket_is_a_reason_and_no_error(tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    telling = Telling(folder, lambda: FACTS)
    assert "too long" in telling.refusal
    telling.close()


@pytest.mark.parametrize(
    "said",
    [
        b"", b"{}\n", b"[" * 60_000, b"9" * 100_000, b'{"pads": 3, "withheld": {}}',
        json.dumps({**FACTS, "pads": {**PADS._asdict(), "used": -1}}).encode(),
        json.dumps({**FACTS, "pads": {**PADS._asdict(), "used": 1 << 64}}).encode(),
        json.dumps({**FACTS, "pads": {**PADS._asdict(), "pads_per_s": float("inf")}}).encode(),
        json.dumps({**FACTS, "pads": {**PADS._asdict(), "fault": 3}}).encode(),
        json.dumps({**FACTS, "withheld": dict.fromkeys(WITHHELD, "7")}).encode(),
    ],
    ids=["nothing", "empty", "deep", "long", "no object", "negative", "large", "infinite", "no text", "no times"],
)  # fmt: skip
def test_what_is_no_answer_counts_as_none(tmp_path, said):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / STATS_SOCKET))
        listening.listen()

        def answer():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        assert ask(tmp_path) is None
        thread.join()


def test_who_answers_with_nothing_or_never_is_waited_for_no_longer_than_said(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / STATS_SOCKET))
        listening.listen()
        began = time.monotonic()
        assert ask(tmp_path, timeout_s=0.05) is None
        assert time.monotonic() - began >= 0.05


def test_the_times_are_what_is_no_count():
    progress = Progress(*range(1, len(Progress._fields) + 1))
    assert progress.public()._replace(**progress.withheld()) == progress
    assert {name for name in Progress._fields if name.endswith("_ns") or name == "waiting"} == set(WITHHELD)
    assert not any(progress.public().withheld().values())
