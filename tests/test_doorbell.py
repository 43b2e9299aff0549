"""The doorbell in its three modes: order, waking, and waits that end."""

import contextlib
import os
import secrets
import signal
import socket
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from arenas import new_arena
from endpoints import SECRET, connect_to, free_tcp_endpoint, prove

from tsqp_shm import _native
from tsqp_shm.errors import ConfigError, PeerDied, PeerTimeout, ProtocolError
from tsqp_shm.shm import doorbell, layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.byte_stream import ByteStream
from tsqp_shm.shm.doorbell import Doorbell
from tsqp_shm.shm.liveness import HEARTBEAT_INTERVAL_MS, PeerWatch
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.stream import MAX_IPC_PATH_BYTES, ZmqStream

MODES = ("adaptive", "zmq", "spin")
SPIN_US, YIELD_US = 20, 2000
ALIVE = SimpleNamespace(heartbeat_age_s=0.5, check=lambda: None)
SUBMISSION_TAIL, SUBMISSION_HEAD, COMPLETION_TAIL, COMPLETION_PARKED = (
    layout.CONTROL_OFFSET_BYTES + 128 * word for word in (0, 1, 3, 5)
)


@pytest.fixture
def arena():
    plan = Plan.of_slots([("x", "float32", 1, 1)])
    with new_arena(plan) as arena:
        yield arena


def open_doorbell(mode: str, arena: Arena, role: str, endpoint: str, spin_us: int, yield_us: int) -> Doorbell:
    return doorbell.open_doorbell(mode, arena, role, partial(ZmqStream, endpoint, role, SECRET), spin_us, yield_us)


@pytest.fixture
def endpoint(runtime_folder):
    return f"ipc://{runtime_folder}/bell-{secrets.token_hex(4)}"


@pytest.fixture
def bell(arena, endpoint):
    """Opens an end of the test's doorbell, to be closed by the test."""

    def open_end(mode, role, spin_us=SPIN_US, yield_us=YIELD_US):
        return closing(open_doorbell(mode, arena, role, endpoint, spin_us, yield_us))

    return open_end


@pytest.fixture(params=["ZeroMQ", "socket pair"])
def any_bell(request, arena, endpoint):
    """The same over either waker."""
    pair = dict(zip(("tee", "gpu"), socket.socketpair(), strict=True))

    def open_waker(role):
        return (
            ZmqStream(endpoint, role, SECRET) if request.param == "ZeroMQ" else ByteStream(os.dup(pair[role].fileno()))
        )

    def open_end(mode, role, spin_us=SPIN_US, yield_us=YIELD_US):
        return closing(doorbell.open_doorbell(mode, arena, role, partial(open_waker, role), spin_us, yield_us))

    with pair["tee"], pair["gpu"]:
        yield open_end


@pytest.fixture
def raw_peer(endpoint):
    """Takes the GPU process's place at the doorbell, and keeps to no rule."""
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as stack:
        listening.bind(endpoint.removeprefix("ipc://"))
        listening.listen()

        def accept(tee: Doorbell) -> socket.socket:
            """A connection on which it has proved itself, as the GPU process at the other end of `tee` would."""
            connection = stack.enter_context(listening.accept()[0])
            beside(tee, prove, connection, "gpu")
            return connection

        yield accept
    Path(endpoint.removeprefix("ipc://")).unlink()


def beside(bell: Doorbell, act, *arguments) -> None:
    """Does `act` while an end is looked at."""
    acting = threading.Thread(target=act, args=arguments)
    acting.start()
    while acting.is_alive():
        assert bell.poll() is None
    acting.join()


def hung_up(connection: socket.socket) -> None:
    """Waits until the other side has closed the connection, whatever it has said before."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass


def record(number: int) -> bytes:
    return number.to_bytes(8, "little") * 8


def echo(open_end, count):
    with open_end as gpu:
        for _ in range(count):
            gpu.send(gpu.receive(ALIVE, 30.0, "a submission"))


def ring_and_expect_echoes(tee, count, in_flight):
    for number in range(count + in_flight):
        if number < count:
            tee.send(record(number))
        if number >= in_flight:
            assert tee.receive(ALIVE, 30.0, "an echo") == record(number - in_flight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_flight", [1, 20])
def test_records_cross_two_processes_in_order(any_bell, forked, mode, in_flight):
    count = 400
    with any_bell(mode, "tee") as tee:
        child = forked(lambda: echo(any_bell(mode, "gpu"), count))
        ring_and_expect_echoes(tee, count, in_flight)
        child.join()
        assert sum(tee.waits.values()) == count


def test_a_doorbell_can_ring_over_tcp(arena, forked):
    endpoint = free_tcp_endpoint()

    def open_end(role):
        return closing(open_doorbell("adaptive", arena, role, endpoint, 0, 0))

    with open_end("tee") as tee:
        child = forked(lambda: echo(open_end("gpu"), 200))
        ring_and_expect_echoes(tee, 200, 3)
        child.join()


def test_no_wake_up_is_lost(any_bell, forked, arena, monkeypatch):
    """Both sides park before each record, and a sleeper that was not woken would sleep longer than the test may."""
    count = 3000
    monkeypatch.setattr(doorbell, "_SLICE_NS", 100_000_000_000)

    def gpu_side():
        with any_bell("adaptive", "gpu", 0, 0) as gpu:
            # The first record goes out when the TEE is parked: its wake-up then tells that the sockets have met.
            while not _native.load_word(arena.buffer, COMPLETION_PARKED) % 2:
                os.sched_yield()
            while isinstance(gpu.waker, ZmqStream) and not gpu.waker.is_connected():
                gpu.waker.discard()
            gpu.send(record(0))
            for _ in range(count):
                gpu.send(gpu.receive(ALIVE, None, "a submission"))

    with any_bell("adaptive", "tee", 0, 0) as tee:
        child = forked(gpu_side)
        assert tee.receive(ALIVE, None, "the first record") == record(0)
        ring_and_expect_echoes(tee, count, 1)
        child.join()
        assert tee.waits["parked"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_the_tee_may_ring_before_the_gpu_process_is_there(any_bell, mode):
    with any_bell(mode, "tee") as tee:
        tee.send(record(1))
        with any_bell(mode, "gpu") as gpu:
            while (received := gpu.poll()) is None:
                tee.poll()
            assert received == record(1)


@pytest.mark.parametrize("mode", MODES)
def test_the_gpu_process_may_ring_before_the_tee_is_there(any_bell, mode):
    with any_bell(mode, "gpu") as gpu:
        gpu.send(record(1))
        with any_bell(mode, "tee") as tee:
            while (received := tee.poll()) is None:
                gpu.poll()
            assert received == record(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attempt", range(12))
def test_the_last_record_before_a_side_closes_arrives(any_bell, forked, mode, attempt):
    """Whether libzmq has sent it by then is a race, hence the attempts."""

    def say_why_and_end():
        with any_bell(mode, "gpu") as gpu:
            gpu.receive(ALIVE, 30.0, "a submission")
            gpu.send(record(9))

    with any_bell(mode, "tee") as tee:
        child = forked(say_why_and_end)
        tee.send(record(8))
        assert tee.receive(ALIVE, 5.0, "last words") == record(9)
        child.join()


@pytest.mark.parametrize("mode", MODES)
def test_a_timeout_names_what_was_waited_for(any_bell, mode):
    with any_bell(mode, "tee") as tee, pytest.raises(PeerTimeout) as caught:
        tee.receive(ALIVE, 0.01, "SCORES", "scores.1")
    assert (caught.value.operation, caught.value.slot) == ("SCORES", "scores.1")
    assert caught.value.waited_s > 0.01
    assert "0.5 s ago" in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "spin_us", "yield_us"),
    [
        ("adaptive", SPIN_US, YIELD_US),
        ("adaptive", 10_000_000, 0),
        ("adaptive", 0, 10_000_000),
        ("spin", SPIN_US, YIELD_US),
        ("spin", 10_000_000, 0),
        ("zmq", SPIN_US, YIELD_US),
    ],
)
def test_the_death_of_the_peer_ends_a_wait(any_bell, forked, arena, mode, spin_us, yield_us):
    def beat():
        heartbeat = _native.Heartbeat(arena.buffer, "gpu", HEARTBEAT_INTERVAL_MS)
        signal.pause()
        heartbeat.release()

    child = forked(beat)
    watch = PeerWatch(arena, "gpu")
    with any_bell(mode, "tee", spin_us, yield_us) as tee:
        while watch.heartbeat_age_s is None:
            tee.poll()
            watch.check()
        os.kill(child.pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(PeerDied) as caught:
            tee.receive(watch, None, "a completion")
    assert (caught.value.role, child.wait()) == ("gpu", -signal.SIGKILL)
    assert "no heartbeat" in caught.value.exit
    # The contract is one second; the margin is for a machine that is busy with other tests.
    assert time.monotonic() - killed < 3.0


@pytest.mark.parametrize("length", [1, 63])
def test_less_than_a_record_is_none(bell, raw_peer, length):
    with bell("zmq", "tee") as tee:
        raw_peer(tee).send(bytes(length))
        with pytest.raises(PeerTimeout):
            tee.receive(ALIVE, 0.3, "a completion")


def test_records_are_cut_from_the_bytes_as_they_come(bell, raw_peer):
    with bell("zmq", "tee") as tee:
        peer = raw_peer(tee)
        peer.send(record(1) + record(2)[:10])
        assert tee.receive(ALIVE, 30.0, "a completion") == record(1)
        peer.send(record(2)[10:])
        assert tee.receive(ALIVE, 30.0, "a completion") == record(2)


def test_only_the_first_connection_is_heard_until_it_ends(bell, endpoint):
    """Of those that connect to the GPU process."""

    with bell("zmq", "gpu") as gpu, connect_to(endpoint) as first:
        beside(gpu, prove, first, "tee")
        first.send(record(1))
        assert gpu.receive(ALIVE, 30.0, "a submission") == record(1)
        with connect_to(endpoint) as second:
            first.send(record(2))
            assert gpu.receive(ALIVE, 30.0, "a submission") == record(2)
            beside(gpu, hung_up, second)
        first.send(record(3) + b"unfinished")
        assert gpu.receive(ALIVE, 30.0, "a submission") == record(3)
        first.close()
        with connect_to(endpoint) as third:
            beside(gpu, prove, third, "tee")
            third.send(record(4))
            assert gpu.receive(ALIVE, 30.0, "a submission") == record(4)


def test_the_tee_listens_nowhere(bell):
    def listening():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the folder that is read
            return [
                path.readlink()
                for path in Path("/proc/self/fd").iterdir()
                if path.is_socket() and is_listening(int(path.name))
            ]

    def is_listening(fd):
        with socket.socket(fileno=os.dup(fd)) as found:
            return found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)

    with bell("adaptive", "tee") as tee:
        tee.poll()
        assert listening() == []


@pytest.mark.parametrize("mode", ["adaptive", "zmq"])
def test_what_nobody_reads_stays_with_the_kernel(bell, raw_peer, mode):
    """A peer that sends without end is stopped; nothing grows here."""
    with bell(mode, "tee") as tee:
        peer = raw_peer(tee)
        # Ends when nothing has been taken for so long; an unbounded queue would take all of it.
        peer.settimeout(0.5)
        accepted = 0
        with contextlib.suppress(TimeoutError):
            while accepted < 1 << 26:
                accepted += peer.send(bytes(1 << 16))
    assert accepted < 1 << 23


@pytest.mark.parametrize("records", [3, 10, layout.RING_DEPTH])
def test_what_a_side_sent_before_it_closed_arrives(any_bell, records):
    """Nobody takes a record until the sender is gone: libzmq drops what it has not read of a closed connection."""
    with any_bell("zmq", "tee") as tee:
        with any_bell("zmq", "gpu") as gpu:
            tee.send(record(0))
            # They have to meet first, and each goes on with it when it is looked at.
            while (received := gpu.take()) is None:
                tee.take()
            assert received == record(0)
            for number in range(records):
                gpu.send(record(number))
                # Apart, or libzmq would make one chunk of them.
                time.sleep(0.002)
        for number in range(records):
            assert tee.receive(ALIVE, 5.0, "a completion") == record(number)


def test_in_adaptive_mode_a_message_wakes_and_says_nothing(bell, raw_peer):
    with bell("adaptive", "tee") as tee:
        raw_peer(tee).send(record(666))
        with pytest.raises(PeerTimeout):
            tee.receive(ALIVE, 0.3, "a completion")


def test_a_peer_that_sends_without_end_does_not_keep_the_tee_from_its_deadline(bell, raw_peer):
    def flood(peer):
        with contextlib.suppress(OSError):
            while True:
                peer.send(bytes(1 << 16))

    with bell("adaptive", "tee") as tee:
        flooding = threading.Thread(target=flood, args=(raw_peer(tee),))
        flooding.start()
        with pytest.raises(PeerTimeout):
            tee.receive(ALIVE, 0.5, "a completion")
    # The closed doorbell is what ends it.
    flooding.join()


@pytest.mark.parametrize("mode", ["adaptive", "spin"])
def test_a_ring_that_the_peer_broke_is_a_protocol_error(bell, arena, mode):
    with bell(mode, "tee") as tee:
        _native.store_word(arena.buffer, SUBMISSION_HEAD, 1)
        with pytest.raises(ProtocolError) as caught:
            tee.send(record(0))
        assert (caught.value.field, caught.value.found) == ("ring head", 1)
        _native.store_word(arena.buffer, COMPLETION_TAIL, 65)
        with pytest.raises(ProtocolError) as caught:
            tee.poll()
        assert (caught.value.field, caught.value.found) == ("ring tail", 65)


@pytest.mark.parametrize("mode", ["adaptive", "spin"])
def test_a_peer_that_never_takes_a_record_is_a_protocol_error(bell, mode):
    with bell(mode, "tee") as tee:
        for number in range(layout.RING_DEPTH):
            tee.send(record(number))
        with pytest.raises(ProtocolError, match="ring head"):
            tee.send(record(layout.RING_DEPTH))


def ipc_path(folder, length):
    return f"ipc://{folder}/".ljust(length + len("ipc://"), "x")


def test_the_longest_path_that_a_socket_can_have_is_accepted(arena, runtime_folder):
    endpoint = ipc_path(runtime_folder, MAX_IPC_PATH_BYTES)
    open_doorbell("zmq", arena, "tee", endpoint, 0, 0).close()


def test_a_longer_path_is_refused_with_the_limit(arena, runtime_folder):
    endpoint = ipc_path(runtime_folder, MAX_IPC_PATH_BYTES + 1)
    with pytest.raises(ConfigError, match="at most 107 bytes") as caught:
        open_doorbell("adaptive", arena, "tee", endpoint, 0, 0)
    assert (caught.value.field, caught.value.value) == ("endpoint", endpoint)


@pytest.mark.parametrize("role", ["tee", "gpu"])
def test_a_folder_that_does_not_exist_is_the_callers_fault(arena, role):
    with pytest.raises(ConfigError, match="endpoint"):
        open_doorbell("adaptive", arena, role, "ipc:///nonexistent/folder/bell", 0, 0)


def test_an_endpoint_that_cannot_be_bound_is_the_callers_fault(arena):
    with pytest.raises(ConfigError, match="endpoint"):
        open_doorbell("adaptive", arena, "gpu", "tcp://192.0.2.1:9", 0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_doorbell_lets_go_of_the_arena(any_bell, arena, mode):
    with any_bell(mode, "tee") as tee:
        tee.send(record(0))
    arena.buffer.close()  # raises BufferError while anything holds it


def test_an_idle_adaptive_side_only_sleeps(any_bell):
    busy_us = 40_000
    with any_bell("adaptive", "tee", spin_us=busy_us, yield_us=0) as tee:
        tee.poll()
        used_before = time.thread_time()
        for _ in range(4):
            tee.poll()
        # Each of the four would have spun for that long; the processor's time, not the clock's, is what is counted.
        assert time.thread_time() - used_before < busy_us * 1e-6


@pytest.mark.parametrize("role", ["tee", "gpu"])
def test_a_file_at_the_endpoint_is_left_alone(arena, tmp_path, role):
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="endpoint"):
        open_doorbell("zmq", arena, role, f"ipc://{path}", SPIN_US, YIELD_US)
    assert path.read_text() == "mine"


def test_the_endpoint_of_a_live_session_is_not_stolen(arena, bell, endpoint):
    with bell("zmq", "gpu"), pytest.raises(ConfigError, match="live session"):
        open_doorbell("zmq", arena, "gpu", endpoint, SPIN_US, YIELD_US)
