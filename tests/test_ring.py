"""The rings in the arena: order, bounds, and who is woken how often."""

import contextlib
import os
import signal
import threading

import pytest
from arenas import new_arena

from tsqp_shm import _native
from tsqp_shm.errors import ProtocolError
from tsqp_shm.shm import layout
from tsqp_shm.shm.plan import Plan

RINGS = ("submission", "completion")
# Words of the control page, in the order of the byte map: tail, head and parked flag of each ring.
TAIL, HEAD = {"submission": 0, "completion": 3}, {"submission": 1, "completion": 4}
DEPTH = layout.RING_DEPTH
SECOND_NS = 1_000_000_000


@pytest.fixture
def arena():
    plan = Plan.of_slots([("x", "float32", 1, 1)])
    with new_arena(plan) as arena:
        yield arena


def record(number: int) -> bytes:
    return number.to_bytes(8, "little") * 8


def facts(error: ProtocolError) -> tuple[str, object, object]:
    return error.field, error.expected, error.found


def control_offset_bytes(word: int) -> int:
    return layout.CONTROL_OFFSET_BYTES + 128 * word


@pytest.fixture(params=RINGS)
def ring(request):
    return request.param


@pytest.fixture
def writer(arena, ring):
    return _native.RingWriter(arena.buffer, ring)


@pytest.fixture
def reader(arena, ring):
    return _native.RingReader(arena.buffer, ring)


def test_an_empty_ring_times_out(reader):
    assert reader.read(1000, 1000) is None


def test_records_come_in_order_around_the_ring(writer, reader):
    sent = 0
    for burst in (1, DEPTH, 3, DEPTH - 1, DEPTH):
        for number in range(sent, sent + burst):
            writer.write(record(number))
        assert [reader.read(0, 0) for _ in range(burst)] == [record(number) for number in range(sent, sent + burst)]
        sent += burst
    assert reader.read(0, 0) is None


def test_the_two_rings_do_not_mix(arena):
    writers = {name: _native.RingWriter(arena.buffer, name) for name in RINGS}
    readers = {name: _native.RingReader(arena.buffer, name) for name in RINGS}
    for number in range(2 * DEPTH):
        for offset, name in enumerate(RINGS):
            writers[name].write(record(2 * number + offset))
        for offset, name in enumerate(RINGS):
            assert readers[name].read(0, 0) == record(2 * number + offset)


def test_records_cross_two_processes_in_order_in_both_directions(arena, forked):
    count, in_flight = 20 * DEPTH + 7, DEPTH // 2

    def take(reader):
        taken = reader.read(0, 10 * SECOND_NS)
        assert taken is not None
        return taken

    def echo():
        reader, writer = (_native.RingReader(arena.buffer, RINGS[0]), _native.RingWriter(arena.buffer, RINGS[1]))
        for _ in range(count):
            writer.write(take(reader))

    child = forked(echo)
    writer, reader = (_native.RingWriter(arena.buffer, RINGS[0]), _native.RingReader(arena.buffer, RINGS[1]))
    for number in range(count + in_flight):
        if number < count:
            writer.write(record(number))
        if number >= in_flight:
            assert take(reader) == record(number - in_flight)
    child.join()


def test_a_full_ring_is_the_readers_fault(writer):
    for number in range(DEPTH):
        writer.write(record(number))
    with pytest.raises(ProtocolError) as caught:
        writer.write(record(DEPTH))
    assert facts(caught.value) == ("ring head", f"1 to {DEPTH}", 0)


@pytest.mark.parametrize("head", [6, 1 << 63, (1 << 64) - 1])
def test_a_head_that_was_not_reached_is_the_readers_fault(arena, ring, writer, head):
    for number in range(5):
        writer.write(record(number))
    _native.store_word(arena.buffer, control_offset_bytes(HEAD[ring]), head)
    with pytest.raises(ProtocolError) as caught:
        writer.write(record(5))
    assert facts(caught.value) == ("ring head", "0 to 5", head)


@pytest.mark.parametrize("tail", [4, 5 + DEPTH + 1, 0, 1 << 63, (1 << 64) - 1])
def test_a_tail_out_of_range_is_the_writers_fault(arena, ring, writer, reader, tail):
    for number in range(5):
        writer.write(record(number))
        reader.read(0, 0)
    _native.store_word(arena.buffer, control_offset_bytes(TAIL[ring]), tail)
    for look in (lambda: reader.read(0, 0), reader.park):
        with pytest.raises(ProtocolError) as caught:
            look()
        assert facts(caught.value) == ("ring tail", f"5 to {5 + DEPTH}", tail)


def test_a_writer_is_told_once_for_each_park(writer, reader):
    assert not writer.write(record(0))
    reader.read(0, 0)
    for number in range(1, 10, 3):
        assert reader.park()
        assert [writer.write(record(number + i)) for i in range(3)] == [True, False, False]
        reader.unpark()
        assert [reader.read(0, 0) for _ in range(3)] == [record(number + i) for i in range(3)]


def test_a_reader_counts_how_its_waits_ended(writer, reader):
    assert reader.read(0, 0) is None
    writer.write(record(0))
    assert reader.read(0, 0) == record(0)
    assert reader.read_parked() is None
    writer.write(record(1))
    assert reader.read_parked() == record(1)
    assert reader.waits() == {"ready": 1, "spun": 0, "yielded": 0, "parked": 1}


def test_a_reader_that_is_awake_is_not_rung(writer, reader):
    assert reader.park()
    reader.unpark()
    assert not writer.write(record(0))


def test_a_reader_does_not_park_on_a_record(writer, reader):
    writer.write(record(0))
    assert not reader.park()
    assert not writer.write(record(1))


@pytest.mark.parametrize("size", [0, 63, 65])
def test_a_record_is_64_bytes(writer, size):
    with pytest.raises(ValueError, match="64 bytes"):
        writer.write(bytes(size))


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where whoever started the tests has it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_wait_loses_no_record(reader, forked, arena, ring):
    """Ctrl-C that comes before a record does not take the record with it."""
    parent = os.getpid()
    waiting, tell = os.pipe()

    def interrupt_then_write():
        os.read(waiting, 1)
        os.kill(parent, signal.SIGINT)
        _native.RingWriter(arena.buffer, ring).write(record(7))

    child = forked(interrupt_then_write)
    with pytest.raises(KeyboardInterrupt):
        os.write(tell, b"x")
        reader.read(0, 30 * SECOND_NS)
    child.join()
    assert reader.read(0, 0) == record(7)
    os.close(waiting)
    os.close(tell)


def test_a_released_end_lets_go_of_the_arena(arena, writer, reader):
    writer.release()
    reader.release()
    with pytest.raises(ValueError, match="release"):
        writer.write(record(0))
    for use in (lambda: reader.read(0, 0), reader.park, reader.unpark):
        with pytest.raises(ValueError, match="release"):
            use()
    arena.buffer.close()  # raises BufferError while anything holds it


def test_a_ring_has_one_of_two_names(arena):
    with pytest.raises(ValueError, match="submission"):
        _native.RingReader(arena.buffer, "third")


def test_memory_smaller_than_the_fixed_pages_is_no_arena():
    with pytest.raises(ValueError, match="at least"):
        _native.RingReader(bytearray(layout.SLOTS_OFFSET_BYTES - 1), "submission")


@pytest.mark.parametrize("offset_bytes", [4, layout.SLOTS_OFFSET_BYTES, layout.SLOTS_OFFSET_BYTES - 4, 1 << 63])
def test_only_words_of_the_fixed_pages_are_read_and_written(arena, offset_bytes):
    with pytest.raises(IndexError):
        _native.load_word(arena.buffer, offset_bytes)
    with pytest.raises(IndexError):
        _native.store_word(arena.buffer, offset_bytes, 0)


@pytest.mark.parametrize("attempt", range(5))
def test_a_wait_outlives_the_release_of_its_ring_by_another_thread(arena, forked, attempt):
    def race():
        reader = _native.RingReader(arena.buffer, "completion")
        about_to_wait = threading.Event()

        def wait():
            about_to_wait.set()
            # Called with a ring that is released already, where that comes first.
            with contextlib.suppress(ValueError):
                assert reader.read(0, SECOND_NS // 20) is None

        waiting = threading.Thread(target=wait)
        waiting.start()
        about_to_wait.wait()
        reader.release()
        # The mapping goes, unless the wait holds it.
        with contextlib.suppress(BufferError):
            arena.buffer.close()
        waiting.join()
        with pytest.raises(ValueError, match="release"):
            reader.available()

    forked(race).join()
