"""Who counts as dead: a peer whose beat has stopped, and not a machine that stopped for a moment."""

import itertools
import os
from types import SimpleNamespace

import pytest
from arenas import new_arena

from tsqp_shm import _native
from tsqp_shm.errors import ModelFileError, PeerDied
from tsqp_shm.shm import liveness
from tsqp_shm.shm.liveness import HEARTBEAT_OFFSETS, LOOK_INTERVAL_S, SILENCE_S, PeerWatch
from tsqp_shm.shm.plan import Plan

# What passes between two looks: the wait for a record takes the interval and a little more.
LOOK_S = LOOK_INTERVAL_S + 0.003
BEAT_S = liveness.HEARTBEAT_INTERVAL_MS / 1000


@pytest.fixture
def arena():
    plan = Plan.of_slots([("x", "float32", 1, 1)])
    with new_arena(plan) as arena:
        yield arena


@pytest.fixture
def clock(monkeypatch):
    """The watch's clock, set by hand."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def beat(arena, value, role="gpu"):
    _native.store_word(arena.buffer, HEARTBEAT_OFFSETS[role], value)


def test_a_peer_that_has_not_begun_is_not_dead(arena, clock):
    watch = PeerWatch(arena, "gpu")
    for _ in range(1000):
        clock.now += LOOK_S
        watch.check()
    assert watch.heartbeat_age_s is None


def test_a_peer_that_beats_lives(arena, clock):
    watch = PeerWatch(arena, "gpu")
    for value in range(1, 1000):
        beat(arena, value)
        clock.now += LOOK_S
        watch.check()
        assert watch.heartbeat_age_s == 0


@pytest.mark.parametrize("phase", [0.0, 0.01, 0.03, 0.05, 0.0799])
def test_death_is_known_within_a_second(arena, clock, phase):
    watch = PeerWatch(arena, "gpu")
    begun, dies_at = clock.now, clock.now + 5 + phase
    with pytest.raises(PeerDied) as caught:
        for look in itertools.count(1):
            clock.now = begun + look * LOOK_S
            beat(arena, 1 + int((min(clock.now, dies_at) - begun) / BEAT_S))
            watch.check()
    assert 0 < clock.now - dies_at < 1.0
    assert caught.value.role == "gpu"
    assert "no heartbeat" in caught.value.exit


def test_a_machine_that_stopped_for_a_moment_is_not_a_dead_peer(arena, clock):
    watch = PeerWatch(arena, "gpu")
    beat(arena, 1)
    watch.check()
    for value in range(2, 10):
        clock.now += 60.0
        watch.check()
        clock.now += LOOK_S
        beat(arena, value)
        watch.check()


def test_looks_in_quick_succession_count_as_one(arena, clock):
    watch = PeerWatch(arena, "gpu")
    beat(arena, 1)
    watch.check()
    clock.now += SILENCE_S * 2
    for _ in range(1000):
        watch.check()


@pytest.mark.parametrize("value", [0, 4, (1 << 64) - 1])
def test_any_change_counts_as_life(arena, clock, value):
    watch = PeerWatch(arena, "gpu")
    for _ in range(100):
        for number in (5, value):
            clock.now += LOOK_S
            beat(arena, number)
            watch.check()


@pytest.mark.parametrize(("role", "other"), [("tee", "gpu"), ("gpu", "tee")])
def test_the_own_beat_does_not_keep_the_peer_alive(arena, clock, role, other):
    watch = PeerWatch(arena, role)
    beat(arena, 1, role)
    with pytest.raises(PeerDied):
        for value in range(100):
            beat(arena, value, other)
            clock.now += LOOK_S
            watch.check()


def test_a_child_says_itself_why_it_ended(arena):
    death = ModelFileError("/model", "gone")
    with pytest.raises(ModelFileError) as caught:
        PeerWatch(arena, "gpu", SimpleNamespace(death=lambda: death)).check()
    assert caught.value is death


def test_a_child_that_has_stopped_to_beat_may_take_its_time_to_end(arena, clock):
    """It says why it ends when it has: on a busy machine that takes longer than a stranger's silence may last."""
    death = None
    watch = PeerWatch(arena, "gpu", SimpleNamespace(death=lambda: death))
    beat(arena, 1)
    for _ in range(50):
        clock.now += LOOK_S
        watch.check()
    death = ModelFileError("/model", "gone")
    with pytest.raises(ModelFileError):
        watch.check()


def test_a_child_that_lives_but_does_not_beat_is_dead(arena, clock):
    watch = PeerWatch(arena, "gpu", SimpleNamespace(death=lambda: None))
    beat(arena, 1)
    with pytest.raises(PeerDied, match="no heartbeat"):
        for _ in range(100):
            clock.now += LOOK_S
            watch.check()


def test_the_heart_beats_while_the_interpreter_is_busy(arena, forked):
    def hold_the_interpreter():
        heartbeat = _native.Heartbeat(arena.buffer, "gpu", 1)
        sum(itertools.repeat(0))  # never ends and never lets another Python thread run
        heartbeat.release()

    child = forked(hold_the_interpreter)
    seen = set()
    while len(seen) < 20:
        seen.add(_native.load_word(arena.buffer, HEARTBEAT_OFFSETS["gpu"]))
        os.sched_yield()
    child.kill()


@pytest.mark.parametrize("role", ["tee", "gpu"])
def test_a_released_heart_has_stopped(arena, role):
    heartbeat = _native.Heartbeat(arena.buffer, role, 1)
    while not _native.load_word(arena.buffer, HEARTBEAT_OFFSETS[role]):
        os.sched_yield()
    heartbeat.release()
    arena.buffer.close()  # raises BufferError while anything holds it
