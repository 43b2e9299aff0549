"""A waker over a descriptor: whole records, bounded, and an end that neither hangs nor spins."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tsqp_shm.shm import layout
from tsqp_shm.shm.byte_stream import CHUNK_BYTES, ByteStream


def record(number: int) -> bytes:
    return number.to_bytes(8, "little") * 8


@pytest.fixture
def ends() -> Iterator[tuple[ByteStream, socket.socket]]:
    """One end, and the bare socket behind it."""
    ours, theirs = socket.socketpair()
    with theirs, closing(ByteStream(ours.detach())) as stream:
        yield stream, theirs


def test_records_are_cut_from_the_bytes_as_they_come(ends):
    stream, peer = ends
    peer.send(record(1) + record(2)[:10])
    assert stream.receive(0) == record(1)
    assert stream.receive(0) is None
    peer.send(record(2)[10:])
    assert stream.receive(0) == record(2)


@pytest.fixture
def room(monkeypatch) -> list[int]:
    """How many bytes the kernel takes at each write, one after the other; none when they are used up."""
    room: list[int] = []
    write = os.write

    def take_in_part(fd: int, data: bytes) -> int:
        if not room:
            raise BlockingIOError
        return write(fd, data[: room.pop(0)])

    monkeypatch.setattr(os, "write", take_in_part)
    return room


def test_the_end_of_a_record_leaves_while_its_sender_waits(ends, room):
    stream, peer = ends
    room[:] = [10]
    assert stream.try_send(record(1))
    room[:] = [54]
    assert not stream.wait(0)
    assert peer.recv(100) == record(1)


def test_a_record_that_the_kernel_took_in_part_is_not_cut(ends, room):
    """What is sent after it waits until its end is on the way."""
    stream, peer = ends
    room[:] = [10]
    assert stream.try_send(record(1))
    assert not stream.try_send(record(2))
    room[:] = [20, 30]
    assert not stream.try_send(record(2))
    assert not stream.try_send(record(2))
    room[:] = [64, 64]
    assert stream.try_send(record(2))
    assert peer.recv(1000) == record(1) + record(2)


def test_a_record_of_which_nothing_was_taken_was_not_sent(ends, room):
    stream, peer = ends
    assert not stream.try_send(record(1))
    room[:] = [64]
    assert stream.try_send(record(2))
    assert peer.recv(1000) == record(2)


def test_what_nobody_asks_for_stays_with_the_kernel(ends):
    stream, peer = ends
    peer.settimeout(0.2)
    with pytest.raises(TimeoutError):
        while True:
            peer.send(bytes(1 << 16))
    for _ in range(3):
        assert stream.receive(0) == bytes(layout.RECORD_BYTES)
        assert len(stream._received) < CHUNK_BYTES + layout.RECORD_BYTES


def test_a_peer_that_sends_without_end_does_not_keep_a_side_that_discards(ends, monkeypatch):
    stream, peer = ends
    peer.send(b"x")
    reads = []
    monkeypatch.setattr(os, "read", lambda fd, size: reads.append(size) or b"x" * size)
    stream.discard()
    assert reads == [CHUNK_BYTES] * layout.RING_DEPTH
    assert stream._received == b""


def test_a_stream_whose_other_side_has_closed_is_slept_at_and_not_spun_at(ends):
    stream, peer = ends
    peer.close()
    assert stream.receive(1_000_000) is None
    used_before, begun = time.thread_time(), time.monotonic()
    for _ in range(20):
        assert not stream.wait(5_000_000)
    assert time.monotonic() - begun >= 0.1
    assert time.thread_time() - used_before < 0.05
    stream.discard()
    assert not stream.try_send(record(1))


def test_what_was_sent_before_the_end_is_still_received(ends):
    stream, peer = ends
    peer.send(record(7))
    peer.close()
    assert stream.receive(1_000_000) == record(7)
    assert stream.receive(1_000_000) is None


def test_closing_lets_the_end_of_a_record_leave(room):
    ours, peer = socket.socketpair()
    stream = ByteStream(ours.detach())
    room[:] = [10]
    assert stream.try_send(record(1))
    room[:] = [3, 64]
    stream.close(linger_ms=10_000)
    with peer:
        assert peer.recv(1000) == record(1)


def test_closing_does_not_wait_for_who_never_reads(room):
    ours, peer = socket.socketpair()
    stream = ByteStream(ours.detach())
    room[:] = [10]
    assert stream.try_send(record(1))
    stream.close(linger_ms=20)
    with peer:
        assert peer.recv(1000) == record(1)[:10]


def test_a_character_device_is_a_stream_too():
    """A pseudo-terminal, as a virtio port would be."""
    import tty

    near, far = os.openpty()
    tty.setraw(near)
    tty.setraw(far)
    with closing(ByteStream(near)) as one, closing(ByteStream(far)) as other:
        assert one.try_send(record(1))
        assert other.receive(1_000_000_000) == record(1)
        assert other.try_send(record(2))
        assert one.receive(1_000_000_000) == record(2)
