"""The TEE's end of the doorbell: what is handed over, what comes back, and for how long slots are away."""

from __future__ import annotations

import secrets
import signal
import threading
import time
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import pytest
from arenas import new_arena
from endpoints import SECRET, meet
from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm import _native
from tsqp_shm.errors import PeerDied, PeerTimeout, ProtocolError, SlotOwnershipError
from tsqp_shm.shm import layout
from tsqp_shm.shm.doorbell import SpinDoorbell, open_doorbell
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.stream import ZmqStream
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Record, Status, pack_completion
from tsqp_shm.shm.slots import open_slots
from tsqp_shm.shm.tiling import Tile
from tsqp_shm.tee.finite import FiniteSubmissionQueue
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue

EPOCH = 0xFEED_0000_0000_0001
PLAN = Plan.of_slots([("x", "bfloat16", 8, 8), ("qk", "bfloat16", 8, 16), ("scores.0", "bfloat16", 4, 64, "tile")])
X, QK, SCORES = PLAN.slots
ALIVE = SimpleNamespace(heartbeat_age_s=0.5, check=lambda: None)
MODES = ("adaptive", "spin", "zmq")
QKV = {"in_slot": X, "out_slot": QK, "rows": 1}

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))


class Sides:
    """A queue, and the end that a GPU process would have."""

    def __init__(self, slots, tee, gpu, kind=SubmissionQueue, watch=ALIVE, timeout_s=30.0):
        self.slots = slots
        self.gpu = gpu
        self.statistics = Statistics()
        self.queue = kind(slots, tee, watch, EPOCH, timeout_s, self.statistics)

    def submission(self) -> bytes:
        return self.gpu.receive(ALIVE, 30.0, "a submission")

    def answer(self, status=Status.OK, busy_ns=0, value=0, **wrong) -> None:
        record = Record.unpack(pack_completion(self.submission(), status, busy_ns, value))
        self.gpu.send(record._replace(**wrong).pack())


@pytest.fixture
def arena():
    with new_arena(PLAN, epoch=EPOCH) as arena:
        yield arena


@pytest.fixture
def slots(arena):
    with open_slots(arena) as slots:
        yield slots


@pytest.fixture
def ends(arena, runtime_folder):
    """Opens both ends of a doorbell."""
    opened = []

    def open_ends(mode):
        endpoint = f"ipc://{runtime_folder}/{secrets.token_hex(4)}"
        for role in ("gpu", "tee"):
            opened.append(open_doorbell(mode, arena, role, partial(ZmqStream, endpoint, role, SECRET), 2, 50))
        if mode != "spin":
            meet(*(end.waker for end in opened))
        return reversed(opened)

    yield open_ends
    for bell in opened:
        bell.close()


@pytest.fixture(params=MODES)
def sides(slots, ends, request):
    return Sides(slots, *ends(request.param))


@pytest.fixture
def spinning(slots, ends):
    return Sides(slots, *ends("spin"))


@given(u16, u16, u16, u16, u32, u32, u32, u32, u64)
def test_a_record_is_packed_as_the_protocol_says(
    opcode, target, in_slot, out_slot, first_row, rows, first, number, epoch
):
    delivered = []
    tallies = _native.Tallies()
    slots = [(1, 8, False)] * NO_SLOT
    submissions = _native.Submissions(epoch, slots, _native.Loans(), tallies, delivered.append)
    fields = opcode, target, in_slot, out_slot, first_row, rows, first, number
    for sequence in (1, 2):
        assert submissions.submit(tallies.number_of("QKV"), *fields, 0) == sequence
        assert delivered.pop() == Record(sequence, epoch, *fields).pack()


def test_a_submission_says_which_rows_of_which_slots(sides):
    sides.queue.submit(Opcode.SCORES, target=3, in_slot=QK, out_slot=SCORES, first_row=2, rows=5, tile=Tile(1, 4))
    assert Record.unpack(sides.submission()) == Record(1, EPOCH, Opcode.SCORES, 3, QK.index, SCORES.index, 2, 5, 1, 4)


def test_a_completion_ends_the_wait_for_it_and_for_all_before_it(sides):
    first, second = (sides.queue.submit(Opcode.QKV, **QKV) for _ in range(2))
    sides.answer()
    sides.answer()
    sides.queue.wait(second)
    sides.queue.wait(first)


def test_waiting_for_what_is_complete_returns_at_once_while_another_is_in_flight(sides):
    first, second = (sides.queue.submit(Opcode.QKV, **QKV) for _ in range(2))
    sides.answer()
    sides.queue.wait(first)
    # The second has no answer: a wait that went past the first would not end.
    sides.queue.wait(first)
    assert sides.statistics.gpu["QKV"].calls == 1
    sides.answer()
    sides.queue.wait(second)
    assert sides.statistics.gpu["QKV"].calls == 2


def test_nothing_is_waited_for_that_was_not_submitted(sides):
    with pytest.raises(ValueError, match="submitted"):
        sides.queue.wait(1)
    sides.queue.drain()


@pytest.mark.parametrize("mode", MODES)
def test_a_wait_ends_with_what_it_waited_for(slots, ends, mode):
    sides = Sides(slots, *ends(mode), timeout_s=0.1)
    sequence = sides.queue.submit(Opcode.QKV, **QKV)
    with pytest.raises(PeerTimeout) as caught:
        sides.queue.wait(sequence)
    assert (caught.value.operation, caught.value.slot, caught.value.answered) == ("QKV", "qk", None)
    # It can be taken up again.
    sides.answer()
    sides.queue.begin_step()
    sides.queue.wait(sequence)


@pytest.mark.parametrize("mode", MODES)
def test_the_waits_of_a_step_are_bounded_by_their_sum(slots, ends, mode):
    """Each answer comes well before the limit, and all of them would take four times as long."""
    sides = Sides(slots, *ends(mode), timeout_s=0.2)
    sides.queue.begin_step()
    for _ in range(20):
        sides.queue.submit(Opcode.EMBED)
    peer = threading.Thread(target=lambda: [(time.sleep(0.04), sides.answer()) for _ in range(20)])
    peer.start()
    with pytest.raises(PeerTimeout, match=r"one step, .* of 20 operations answered, .* --max-batch-tokens") as caught:
        sides.queue.wait(20)
    peer.join()
    answered, asked = caught.value.answered
    assert 0 < answered < 12
    assert asked == 20
    # The next step's are its own.
    sides.queue.begin_step()
    sequence = sides.queue.submit(Opcode.EMBED)
    sides.answer()
    sides.queue.wait(sequence)


@pytest.mark.parametrize("mode", MODES)
def test_the_watch_is_asked_however_fast_completions_come(slots, ends, mode):
    class Stop(Exception):
        pass

    def check():
        nonlocal asked
        asked += 1
        if asked == 4:
            raise Stop

    asked = 0
    sides = Sides(slots, *ends(mode), watch=SimpleNamespace(heartbeat_age_s=0.5, check=check))
    with pytest.raises(Stop):
        while True:
            sequence = sides.queue.submit(Opcode.EMBED)
            sides.answer()
            sides.queue.wait(sequence)


def test_a_wait_asks_whether_the_peer_lives(slots, ends):
    def die():
        raise PeerDied("gpu", "exit code 1")

    sides = Sides(slots, *ends("adaptive"), watch=SimpleNamespace(heartbeat_age_s=None, check=die))
    with pytest.raises(PeerDied):
        sides.queue.call(Opcode.READY)


def test_rows_are_away_until_their_completion_was_waited_for(sides):
    sequence = sides.queue.submit(Opcode.QKV, in_slot=X, out_slot=QK, first_row=2, rows=3)
    for slot in (X, QK):
        sides.slots.own(slot, 0, 2)
        sides.slots.own(slot, 5, 3)
        with pytest.raises(SlotOwnershipError) as caught:
            sides.slots.own(slot, 0, 3)
        assert (caught.value.slot, caught.value.operation) == (slot.name, "QKV")
    sides.answer()
    with pytest.raises(SlotOwnershipError):
        sides.slots.own(X)
    sides.queue.wait(sequence)
    for slot in (X, QK):
        sides.slots.own(slot)


def test_a_score_slot_is_away_as_a_whole(sides):
    sequence = sides.queue.submit(Opcode.CONTEXT, in_slot=SCORES, rows=1, tile=Tile(0, 1), tile_bytes=96)
    with pytest.raises(SlotOwnershipError, match=r"scores\.0 .* CONTEXT"):
        sides.slots.own(SCORES, 3, 1)
    assert (sides.statistics.bytes_to_gpu, sides.statistics.bytes_to_tee) == (96, 0)
    sides.answer()
    sides.queue.wait(sequence)
    sides.slots.own(SCORES)


def test_one_more_than_the_ring_holds_waits_for_the_oldest(sides):
    for _ in range(layout.RING_DEPTH):
        sides.queue.submit(Opcode.QKV, **QKV)
    sides.answer()
    assert sides.queue.submit(Opcode.QKV, **QKV) == layout.RING_DEPTH + 1
    for _ in range(layout.RING_DEPTH):
        sides.answer()
    sides.queue.drain()
    assert sides.statistics.gpu["QKV"].calls == layout.RING_DEPTH + 1


def test_a_call_returns_what_its_completion_adds(sides):
    waiting = sides.queue.submit(Opcode.QKV, **QKV)
    sides.answer(value=5)
    sides.queue.wait(waiting)
    sides.queue.submit(Opcode.READY)
    sides.answer(value=7)
    sides.queue.drain()
    # An answer that is there before the question: the ring holds both.
    sides.gpu.send(Record(3, EPOCH, Opcode.STATUS, 0, NO_SLOT, NO_SLOT, 0, 0, 0, 0).pack()[:56] + b"\x09" + bytes(7))
    assert sides.queue.call(Opcode.STATUS).value == 9


@pytest.mark.parametrize("field", Record._fields[:10])
def test_a_completion_that_differs_in_one_field_is_refused_by_its_name(sides, field):
    sequence = sides.queue.submit(Opcode.QKV, target=1, first_row=1, tile=Tile(1, 1), **QKV)
    sides.answer(**{field: 0x1F})
    with pytest.raises(ProtocolError) as caught:
        sides.queue.wait(sequence)
    assert (caught.value.field, caught.value.found) == (field, 0x1F)


@pytest.mark.parametrize(
    ("wrong", "field"), [({"status": 3}, "status"), ({"reserved": 1}, "reserved"), ({"status": 1 << 31}, "status")]
)
def test_a_completion_with_what_no_completion_holds_is_refused(sides, wrong, field):
    sequence = sides.queue.submit(Opcode.QKV, **QKV)
    sides.answer(**wrong)
    with pytest.raises(ProtocolError) as caught:
        sides.queue.wait(sequence)
    assert caught.value.field == field


@pytest.mark.parametrize("mode", MODES)
def test_an_end_completes_what_it_received_as_the_protocol_says(ends, mode):
    tee, gpu = ends(mode)
    tee.send(submission := Record(1, EPOCH, Opcode.QKV, 1, 2, 3, 4, 5, 6, 7).pack())
    assert gpu.receive(ALIVE, 30.0, "a submission") == submission
    outcome = Status.FAILED, 1 << 40, (1 << 64) - 1
    gpu.complete(submission, *outcome)
    assert tee.receive(ALIVE, 30.0, "a completion") == pack_completion(submission, *outcome)


def test_a_rejected_submission_is_named(sides):
    sequence = sides.queue.submit(Opcode.QKV, **QKV)
    sides.answer(Status.REJECTED)
    with pytest.raises(ProtocolError, match="QKV rejected"):
        sides.queue.wait(sequence)


def test_an_operation_that_failed_is_named(sides, monkeypatch):
    monkeypatch.setattr("tsqp_shm.tee.submission.LAST_WORDS_TIMEOUT_S", 0.0)
    sequence = sides.queue.submit(Opcode.QKV, **QKV)
    sides.answer(Status.FAILED)
    with pytest.raises(PeerDied, match="QKV failed"):
        sides.queue.wait(sequence)


def test_a_ring_that_the_peer_broke_ends_the_wait(spinning, arena):
    sequence = spinning.queue.submit(Opcode.QKV, **QKV)
    completion_tail = layout.CONTROL_OFFSET_BYTES + 3 * 128
    _native.store_word(arena.buffer, completion_tail, layout.RING_DEPTH + 1)
    with pytest.raises(ProtocolError, match="ring tail"):
        spinning.queue.wait(sequence)


def test_statistics_count_doorbells_bytes_and_times(sides):
    for _ in range(3):
        sequence = sides.queue.submit(Opcode.QKV, in_slot=X, out_slot=QK, rows=2)
        sides.answer(busy_ns=1 << 63)
        sides.queue.wait(sequence)
    statistics = sides.statistics
    assert (statistics.doorbells, statistics.bytes_to_gpu, statistics.bytes_to_tee) == (3, 3 * 2 * 16, 3 * 2 * 32)
    (row,) = statistics.operations()
    assert (row["operation"], row["side"], row["calls"], row["share"]) == ("QKV", "gpu", 3, 1.0)
    # A claim of centuries is cut down to what has passed, of which nothing remains for the round trip.
    assert 0 < row["total_s"] < 30
    assert statistics.round_trip_us(50) == 0
    assert statistics.waiting_ns > 0


def test_round_trips_are_those_of_doorbells_that_were_alone(sides):
    assert sides.statistics.round_trip_us(50) is None
    for count in (2, 1):
        for _ in range(count):
            sides.queue.submit(Opcode.QKV, **QKV)
        for _ in range(count):
            sides.answer()
        sides.queue.drain()
    assert len(sides.statistics.submissions.newest_round_trips()) == 2
    assert sides.statistics.round_trip_us(0) > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_peer_in_another_process_is_served_asleep_or_awake(slots, arena, runtime_folder, forked, mode):
    """Neither spins nor yields in mode adaptive: each sleeps whenever it waits."""
    count = 300
    endpoint = f"ipc://{runtime_folder}/{secrets.token_hex(4)}"

    def open_end(role):
        return closing(open_doorbell(mode, arena, role, partial(ZmqStream, endpoint, role, SECRET), 0, 0))

    def serve():
        with open_end("gpu") as gpu:
            for _ in range(count):
                gpu.complete(gpu.receive(ALIVE, 30.0, "a submission"), Status.OK)

    with open_end("tee") as tee:
        sides = Sides(slots, tee, None)
        child = forked(serve)
        sequences = [sides.queue.submit(Opcode.QKV, **QKV) for _ in range(20)]
        for _ in range(count - len(sequences)):
            sides.queue.wait(sequences.pop(0))
            sequences.append(sides.queue.submit(Opcode.QKV, **QKV))
        sides.queue.drain()
        child.join()
        assert sides.statistics.gpu["QKV"].calls == sum(tee.waits.values()) == count


def test_ctrl_c_while_it_waits_loses_no_completion(spinning, monkeypatch):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sequence = spinning.queue.submit(Opcode.QKV, **QKV)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ALIVE, "check", lambda: signal.raise_signal(signal.SIGINT))
            spinning.queue.wait(sequence)
    finally:
        signal.signal(signal.SIGINT, previous)
    spinning.answer()
    spinning.queue.wait(sequence)


def test_a_checked_result_that_is_not_finite_is_named_where_it_completes(slots, ends):
    sides = Sides(slots, *ends("spin"), kind=FiniteSubmissionQueue)
    slots.view(QK)[1, 3] = 0x7FC0
    first = sides.queue.submit(Opcode.QKV, target=2, in_slot=X, out_slot=QK, rows=1)
    second = sides.queue.submit(Opcode.QKV, target=3, in_slot=X, out_slot=QK, first_row=1, rows=1)
    third = sides.queue.submit(Opcode.QKV, target=4, in_slot=X, out_slot=QK, first_row=2, rows=1)
    for _ in range(3):
        sides.answer()
    sides.queue.wait(first)
    with pytest.raises(ProtocolError, match="result of QKV in layer 3"):
        sides.queue.wait(third)
    assert second < third


def test_a_released_ring_is_not_used(slots, arena):
    with closing(SpinDoorbell(arena, "tee", 0)) as tee:
        queue = SubmissionQueue(slots, tee, ALIVE, EPOCH, 1.0, Statistics())
    with pytest.raises(ValueError, match="release"):
        queue.submit(Opcode.READY)
