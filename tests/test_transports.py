"""What every transport owes both sides of a session, whatever carries it."""

from __future__ import annotations

import secrets
from contextlib import ExitStack, closing

import pytest
from arenas import arena_of
from local_session import LocalGpus
from models import RandomModel, model_folder, random_token_ids, token_ids

from tsqp_shm import SamplingParams, _native
from tsqp_shm.errors import ArenaMismatch, ArenaNotReady, SessionBusy
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.local import LocalTransport
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.transport import Hold, Transport

PLAN = Plan.of_slots([("x", "float32", 1, 1)])
INVITATION = b"come in"
BEAT_MS = 10
RECORD = bytes(range(layout.RECORD_BYTES))

# Each makes, of a folder of the test's own, a transport that has carried nothing yet.
TRANSPORTS = {
    "posix": lambda folder: PosixTransport(f"t-{secrets.token_hex(4)}", None),
    "local": lambda folder: LocalTransport(),
}


@pytest.fixture(params=TRANSPORTS)
def transport(request, tmp_path) -> Transport:
    return TRANSPORTS[request.param](tmp_path)


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def begin(transport: Transport, stack: ExitStack) -> Hold:
    hold = transport.begin()
    stack.callback(hold.end)
    return hold


def publish(hold: Hold, stack: ExitStack, epoch: int = 1, *, beats: bool = True) -> Arena:
    arena = stack.enter_context(arena_of(hold, PLAN, epoch))
    arena.publish(INVITATION)
    if beats:
        stack.callback(_native.Heartbeat(arena.buffer, "tee", BEAT_MS).release)
    return arena


def test_one_tee_at_a_time_has_the_session(transport):
    hold = transport.begin()
    with pytest.raises(SessionBusy):
        transport.begin()
    hold.end()
    hold.end()
    transport.begin().end()


def test_nobody_is_joined_where_nobody_began(transport):
    with pytest.raises(ArenaNotReady, match=r"no TEE .*began"):
        transport.join(0.05, len)


def test_a_live_tee_is_joined_with_its_invitation_and_its_memory(transport, stack):
    arena = publish(begin(transport, stack), stack, epoch=7)
    with closing(transport.join(30.0, len)) as joined:
        assert joined.invitation == INVITATION
        with Arena.attach(joined.map_memory(PLAN.total_bytes), PLAN) as attached:
            assert attached.epoch == 7
            _native.store_word(attached.buffer, layout.GPU_HEARTBEAT_OFFSET_BYTES, 5)
            assert _native.load_word(arena.buffer, layout.GPU_HEARTBEAT_OFFSET_BYTES) == 5


def test_a_header_whose_heartbeat_stands_still_is_not_joined(transport, stack):
    publish(begin(transport, stack), stack, beats=False)
    with pytest.raises(ArenaNotReady, match="no heartbeat"):
        transport.join(0.3, len)


def test_memory_of_another_size_than_the_plans_is_refused(transport, stack):
    publish(begin(transport, stack), stack)
    with closing(transport.join(30.0, len)) as joined, pytest.raises(ArenaMismatch) as caught:
        joined.map_memory(2 * PLAN.total_bytes)
    assert caught.value.field == "size in bytes"


def require_waking(transport: Transport, hold: Hold) -> None:
    """A record crosses each way between the wakers of the memory that is joined."""
    with closing(transport.join(30.0, len)) as joined:
        tee, gpu = hold.open_waker(), joined.open_waker(hold.endpoint)
    with closing(tee), closing(gpu):
        for sender, receiver in ((tee, gpu), (gpu, tee)):
            # Where the ends have to meet first, each goes on with it when it is looked at.
            while not sender.try_send(RECORD):
                receiver.wait(0)
            while (found := receiver.receive(1_000_000)) is None:
                sender.wait(0)
            assert found == RECORD


def test_a_record_wakes_the_other_side(transport, stack):
    hold = begin(transport, stack)
    publish(hold, stack)
    require_waking(transport, hold)


def test_a_session_has_one_memory_after_the_other_each_with_its_waker(transport, stack):
    hold = begin(transport, stack)
    with ExitStack() as first:
        publish(hold, first, epoch=1)
        old = first.enter_context(closing(hold.open_waker()))
        old.try_send(RECORD)
    publish(hold, stack, epoch=2)
    with closing(transport.join(30.0, len)) as joined, Arena.attach(joined.map_memory(PLAN.total_bytes), PLAN) as arena:
        assert arena.epoch == 2
    require_waking(transport, hold)


def test_a_whole_session_answers_as_over_any_other(transport):
    folder = model_folder(RandomModel("llama"))
    prompts = [list(random_token_ids(count, seed=count)) for count in (3, 40)]
    answers = []
    for carrier in (LocalTransport(), transport):
        with LocalGpus(folder, carrier).llm(max_model_len=64) as llm:
            answers.append(
                token_ids(llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)))
            )
    assert answers[0] == answers[1]


def test_a_glance_shows_what_is_there_and_that_it_is_gone(transport, stack):
    with pytest.raises(ArenaNotReady):
        transport.glance()
    arena = publish(begin(transport, stack), stack, beats=False)
    with closing(transport.glance()) as glance:
        assert glance.read() == arena.buffer[: layout.SLOTS_OFFSET_BYTES]
        assert not glance.is_gone
        arena.close()
        assert glance.is_gone
    with pytest.raises(ArenaNotReady):
        transport.glance()
