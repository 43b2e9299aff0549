"""How a GPU process finds its TEE: a published header, and a heartbeat beside it that moves."""

import os
import secrets
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from arenas import arena_of
from commands import assert_one_line, run
from models import RandomModel, model_folder

from tsqp_shm import _native
from tsqp_shm.errors import ArenaError, ArenaMismatch, ArenaNotReady
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.transport import PosixTransport

PLAN = Plan.of_slots([("x", "float32", 1, 1)])
INVITATION = b"come in"
BEAT_MS = 10


@pytest.fixture
def name():
    return f"t-{secrets.token_hex(4)}"


def ignore(line: str) -> None:
    pass


class Tee:
    """The TEE's side of a session, as far as it goes until it is joined."""

    def __init__(self, stack: ExitStack, name: str) -> None:
        self.session = stack.enter_context(Session.begin(name))
        self._stack = stack

    def open(self, invitation: bytes = INVITATION, epoch: int = 1) -> Arena:
        arena = self._stack.enter_context(arena_of(self.session, PLAN, epoch))
        arena.publish(invitation)
        return arena

    def beat(self, arena: Arena) -> None:
        self._stack.callback(_native.Heartbeat(arena.buffer, "tee", BEAT_MS).release)


@pytest.fixture
def tee(name):
    with ExitStack() as stack:
        yield Tee(stack, name)


def joins(name: str, timeout_s: float = 30.0, notify=ignore) -> bytes:
    with closing(PosixTransport(name).join(timeout_s, notify)) as joined:
        return joined.invitation


def test_a_live_tee_is_joined_with_its_invitation_and_its_memory(name, tee):
    arena = tee.open()
    tee.beat(arena)
    with closing(PosixTransport(name).join(30.0, ignore)) as joined:
        assert (joined.name, joined.invitation) == (arena_name(name), INVITATION)
        with Arena.attach(joined.map_memory(PLAN.total_bytes), PLAN) as attached:
            assert attached.epoch == arena.epoch


def test_a_header_whose_heartbeat_stands_still_is_not_joined(name, tee):
    arena = tee.open()
    _native.store_word(arena.buffer, layout.TEE_HEARTBEAT_OFFSET_BYTES, 77)
    with pytest.raises(ArenaNotReady, match="no heartbeat"):
        joins(name, 0.3)


def test_the_session_of_a_killed_tee_is_not_joined_and_that_of_its_successor_is(name, held_elsewhere, forked):
    def begin():
        session = Session.begin(name)
        arena = arena_of(session, PLAN, 1)
        heartbeat = _native.Heartbeat(arena.buffer, "tee", BEAT_MS)
        arena.publish(b"of the dead")
        return session, arena, heartbeat

    tee = held_elsewhere(begin)
    assert joins(name) == b"of the dead"
    tee.kill()
    with pytest.raises(ArenaNotReady):
        joins(name, 0.3)
    # Joins while the dead one's arena is there, and must not hold on to it.
    told, tell = os.pipe()
    child = forked(lambda: (os.write(tell, b"x") and joins(name) == b"of the living") or os._exit(1))
    os.read(told, 1)
    with ExitStack() as stack:
        living = Tee(stack, name)
        living.beat(living.open(b"of the living"))
        child.join()
    os.close(told)
    os.close(tell)


def test_a_heartbeat_before_the_header_is_published_does_not_count(name, tee):
    arena = tee._stack.enter_context(arena_of(tee.session, PLAN))
    tee.beat(arena)
    with pytest.raises(ArenaNotReady, match="no TEE process began"):
        joins(name, 0.3)
    arena.publish(INVITATION)
    assert joins(name) == INVITATION


def test_two_epochs_with_different_beats_are_no_heartbeat(name, tee):
    """One TEE's header after another's, each dead: only what moves under one epoch is a sign of life."""
    arena = tee.open()
    looks = 0
    load = _native.load_word

    def change(buffer, offset_bytes):
        nonlocal looks
        if offset_bytes == layout.HEADER_VERSION_OFFSET_BYTES:
            looks += 1
            _native.store_word(arena.buffer, layout.HEADER_EPOCH_OFFSET_BYTES, looks)
            _native.store_word(arena.buffer, layout.TEE_HEARTBEAT_OFFSET_BYTES, looks)
        return load(buffer, offset_bytes)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ArenaNotReady):
        patch.setattr(_native, "load_word", change)
        joins(name, 0.3)
    assert looks > 2


def test_the_second_arena_of_a_session_is_joined_while_the_first_is_waited_at(name, tee, forked):
    first = tee.open(b"first")
    told, tell = os.pipe()
    child = forked(lambda: (os.write(tell, b"x") and joins(name) == b"second") or os._exit(1))
    os.read(told, 1)
    first.close()
    tee.beat(tee.open(b"second", epoch=2))
    child.join()
    os.close(told)
    os.close(tell)


def test_what_is_there_is_joined_without_a_word(name, tee):
    said = []
    tee.beat(tee.open())
    joins(name, 60.0, said.append)
    assert said == []


def test_whoever_waits_is_told_once(name):
    said = []
    begun = threading.Event()

    def notify(line):
        said.append(line)
        begun.set()

    waiting = threading.Thread(target=joins, args=(name, 30.0, notify))
    waiting.start()
    begun.wait()
    with ExitStack() as stack:
        tee = Tee(stack, name)
        tee.beat(tee.open())
        waiting.join()
    assert len(said) == 1
    assert name in said[0]


def test_waiting_in_vain_ends_with_the_command_to_run(name):
    with pytest.raises(ArenaNotReady, match=f"tsqp-shm tee MODEL --session {name}"):
        joins(name, 0.05)


def test_a_session_that_is_not_published_is_waited_for(name):
    with Session.begin(name) as session, arena_of(session, PLAN), pytest.raises(ArenaNotReady):
        joins(name, 0.05)


@pytest.mark.parametrize("version", [1, layout.VERSION - 1, layout.VERSION + 1])
def test_a_live_tee_of_another_version_is_one_clear_line(name, tee, version):
    arena = tee.open(b"\xff" * 100)
    _native.store_word(arena.buffer, layout.HEADER_VERSION_OFFSET_BYTES, version)
    tee.beat(arena)
    with pytest.raises(ArenaMismatch) as caught:
        joins(name)
    assert (caught.value.field, caught.value.expected, caught.value.found) == (
        "layout version", layout.VERSION, version,
    )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_gpu_process_of_another_version_says_so_in_one_line(name, tee):
    arena = tee.open()
    _native.store_word(arena.buffer, layout.HEADER_VERSION_OFFSET_BYTES, layout.VERSION + 1)
    tee.beat(arena)
    folder = model_folder(RandomModel("llama"))
    refused = run("gpu", folder, "--session", name, "-q")
    assert_one_line(refused, 1, f"layout version differs: expected {layout.VERSION}, found {layout.VERSION + 1}")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_memory_that_others_may_open_is_refused(name, tee, mode):
    tee.beat(tee.open())
    Path("/dev/shm" + arena_name(name)).chmod(mode)
    with pytest.raises(ArenaMismatch) as caught:
        joins(name)
    assert (caught.value.field, caught.value.found) == ("mode", oct(mode))


def test_memory_of_another_size_than_the_plans_is_refused(name, tee):
    tee.beat(tee.open())
    with closing(PosixTransport(name).join(30.0, ignore)) as joined, pytest.raises(ArenaMismatch) as caught:
        joined.map_memory(2 * PLAN.total_bytes)
    assert caught.value.field == "size in bytes"


def test_what_was_joined_stays_the_same_when_its_name_is_given_to_another(name, tee):
    first = tee.open(b"first", epoch=7)
    tee.beat(first)
    with closing(PosixTransport(name).join(30.0, ignore)) as joined:
        first.close()
        tee.open(b"second", epoch=8)
        with Arena.attach(joined.map_memory(PLAN.total_bytes), PLAN) as attached:
            assert attached.epoch == 7


def test_a_glance_shows_what_is_there_and_that_it_is_gone(name, tee):
    with pytest.raises(ArenaNotReady, match="none at the moment"):
        PosixTransport(name).glance()
    arena = tee.open()
    with closing(PosixTransport(name).glance()) as glance:
        page = glance.read()
        assert len(page) == layout.SLOTS_OFFSET_BYTES
        assert page == arena.buffer[: layout.SLOTS_OFFSET_BYTES]
        assert not glance.is_gone
        arena.close()
        assert glance.is_gone
        # It has no way to wait for anyone, and what it holds stays readable.
        assert glance.read() == page


def test_what_is_closed_cannot_be_used(name, tee):
    tee.beat(tee.open())
    joined = PosixTransport(name).join(30.0, ignore)
    joined.close()
    joined.close()
    with pytest.raises(ArenaError, match="closed"):
        joined.map_memory(PLAN.total_bytes)
