"""Who is at the other end of a socket: one who has proved to be of the session, or nobody."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import select
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from endpoints import SECRET, connect_to, free_tcp_endpoint, listen_at, meet, prove
from models import RandomModel, model_folder

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.config import require_endpoint
from tsqp_shm.errors import ConfigError
from tsqp_shm.shm import layout
from tsqp_shm.shm.posix.handshake import NONCE_BYTES, PROOF_BYTES, Handshake
from tsqp_shm.shm.posix.memory import take_secret
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.stream import MAX_STRANGERS, MAX_VAIN, ZmqStream

NOBODY = 65534
RECORD = bytes(range(layout.RECORD_BYTES))
SLICE_NS = 20_000_000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request, runtime_folder) -> str:
    return free_tcp_endpoint() if request.param == "tcp" else f"ipc://{runtime_folder}/{secrets.token_hex(4)}"


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def end(endpoint: str, role: str, secret: bytes = SECRET):
    return closing(ZmqStream(endpoint, role, secret))


# The proof.


def exchange(one: Handshake, other: Handshake) -> None:
    to_one, to_other = other.hello, one.hello
    while to_one or to_other:
        to_one, to_other = other.push(to_other), one.push(to_one)


def test_two_who_know_the_secret_prove_it():
    tee, gpu = Handshake(SECRET, "tee"), Handshake(SECRET, "gpu")
    exchange(tee, gpu)
    assert (tee.is_proven, gpu.is_proven) == (True, True)


def test_one_who_knows_another_secret_is_refused():
    tee, gpu = Handshake(SECRET, "tee"), Handshake(bytes(layout.SECRET_BYTES), "gpu")
    exchange(tee, gpu)
    assert (tee.is_refused, gpu.is_refused) == (True, True)


def test_one_who_repeats_what_is_said_is_refused():
    tee = Handshake(SECRET, "tee")
    assert tee.push(tee.hello) == b""
    assert (tee.is_refused, tee.is_echo) == (True, True)


def test_what_proved_one_connection_proves_no_other():
    tee, gpu = Handshake(SECRET, "tee"), Handshake(SECRET, "gpu")
    proof = gpu.push(tee.hello)
    later = Handshake(SECRET, "tee")
    later.push(gpu.hello + proof)
    assert later.is_refused


@pytest.mark.parametrize("size", [1, 31, 33, 1000])
def test_it_comes_in_pieces_of_any_size_and_what_follows_is_kept(size):
    tee, gpu = Handshake(SECRET, "tee"), Handshake(SECRET, "gpu")
    stream = gpu.hello + gpu.push(tee.hello) + RECORD
    replies = []
    for start in range(0, len(stream), size):
        if tee.is_proven:
            tee.rest += stream[start : start + size]
        else:
            replies.append(tee.push(stream[start : start + size]))
    assert (tee.is_proven, tee.rest) == (True, RECORD)
    gpu.push(b"".join(replies))
    assert gpu.is_proven


def test_what_is_said_over_one_connection_proves_nothing_over_another():
    tee, gpu = Handshake(SECRET, "tee", b"one"), Handshake(SECRET, "gpu", b"another")
    exchange(tee, gpu)
    assert (tee.is_refused, gpu.is_refused) == (True, True)


# At the GPU process's end.


def silent(connection: socket.socket) -> None:
    pass


def garbage(connection: socket.socket) -> None:
    connection.sendall(os.urandom(200))


def reflected(connection: socket.socket) -> None:
    connection.settimeout(5.0)
    with contextlib.suppress(OSError):
        while data := connection.recv(4096):
            connection.sendall(data)


def flood(connection: socket.socket) -> None:
    connection.settimeout(5.0)
    with contextlib.suppress(OSError):
        for _ in range(1000):
            connection.sendall(bytes(1 << 16))


STRANGERS = {"silent": silent, "garbage": garbage, "reflected": reflected, "flood": flood}


@pytest.mark.parametrize("how", STRANGERS)
def test_the_peer_gets_through_where_strangers_came_first(stack, endpoint, how):
    gpu = stack.enter_context(end(endpoint, "gpu"))
    for _ in range(MAX_STRANGERS + 4):
        stranger = stack.enter_context(connect_to(endpoint))
        threading.Thread(target=STRANGERS[how], args=(stranger,), daemon=True).start()
    tee = stack.enter_context(end(endpoint, "tee"))
    meet(tee, gpu)
    assert tee.try_send(RECORD)
    while (received := gpu.receive(SLICE_NS)) is None:
        pass
    assert received == RECORD
    assert gpu.try_send(RECORD[::-1])
    while (received := tee.receive(SLICE_NS)) is None:
        gpu.is_connected()
    assert received == RECORD[::-1]


def test_nothing_of_a_stranger_counts(stack, endpoint):
    gpu = stack.enter_context(end(endpoint, "gpu"))
    stranger = stack.enter_context(connect_to(endpoint))
    stranger.sendall(os.urandom(NONCE_BYTES + PROOF_BYTES) + 3 * RECORD)
    told = threading.Thread(target=reads_to_the_end, args=(stranger, said := bytearray()))
    told.start()
    while told.is_alive():
        assert gpu.receive(SLICE_NS) is None
        assert not gpu.try_send(RECORD)
    # A proof that it is the GPU process, of bytes that it has chosen itself; no record.
    assert len(said) <= NONCE_BYTES + PROOF_BYTES


def reads_to_the_end(connection: socket.socket, said: bytearray) -> None:
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(4096):
            said += data


# At the TEE's end.


@pytest.mark.parametrize("how", ["garbage", "reflected", "flood"])
def test_a_stranger_in_the_gpu_processs_place_is_one_error(stack, endpoint, how):
    """Who echoes is met a few times before: it may be this process itself."""
    listening = stack.enter_context(listen_at(endpoint))

    def accept():
        with contextlib.suppress(OSError):
            while True:
                stranger = stack.enter_context(listening.accept()[0])
                threading.Thread(target=STRANGERS[how], args=(stranger,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    tee = stack.enter_context(end(endpoint, "tee"))
    with pytest.raises(ConfigError, match="has not proved to be of it") as caught:
        while True:
            assert tee.receive(SLICE_NS) is None
    assert (caught.value.field, caught.value.value) == ("endpoint", endpoint)
    listening.shutdown(socket.SHUT_RDWR)


def test_a_connection_that_was_made_with_itself_is_given_up(stack, endpoint):
    with listen_at(endpoint) as listening:
        tee = stack.enter_context(end(endpoint, "tee"))
        with listening.accept()[0] as itself:
            threading.Thread(target=reflected, args=(itself,), daemon=True).start()
            again = stack.enter_context(accepted_while(listening, tee))
        beside(tee, proves, again, proven := [])
    while not tee.try_send(RECORD):
        pass
    assert proven
    assert again.recv(len(RECORD), socket.MSG_WAITALL) == RECORD


def beside(tee: ZmqStream, act, *arguments) -> None:
    """Does `act` while an end is looked at."""
    acting = threading.Thread(target=act, args=arguments)
    acting.start()
    while acting.is_alive():
        tee.is_connected()


def test_a_stranger_who_stays_silent_is_told_nothing_and_is_named_at_the_end_of_the_wait(stack, endpoint):
    listening = stack.enter_context(listen_at(endpoint))
    tee = stack.enter_context(end(endpoint, "tee"))
    stranger = stack.enter_context(listening.accept()[0])
    stranger.settimeout(0.1)
    said = b""
    while len(said) < NONCE_BYTES:
        assert not tee.try_send(RECORD)
        with contextlib.suppress(TimeoutError):
            said += stranger.recv(4096)
    for _ in range(20):
        assert not tee.try_send(RECORD)
        assert tee.receive(SLICE_NS) is None
    with pytest.raises(TimeoutError):
        stranger.recv(4096)
    assert len(said) == NONCE_BYTES
    error = tee.stranger()
    assert isinstance(error, ConfigError)
    assert error.value == endpoint


def test_the_peer_gets_through_after_a_stranger_that_hangs_up(stack, endpoint):
    with listen_at(endpoint) as listening:
        tee = stack.enter_context(end(endpoint, "tee"))
        for length in range(3):
            with listening.accept()[0] as stranger:
                stranger.sendall(os.urandom(length))
            tee.receive(SLICE_NS)
    if endpoint.startswith("ipc"):
        Path(endpoint.removeprefix("ipc://")).unlink()
    assert tee.stranger() is None or tee.receive(SLICE_NS) is None
    listening = stack.enter_context(listen_at(endpoint))
    while True:
        peer = stack.enter_context(accepted_while(listening, tee))
        beside(tee, proves, peer, proven := [])
        if proven:
            break
    while not tee.try_send(RECORD):
        pass
    assert peer.recv(len(RECORD), socket.MSG_WAITALL) == RECORD


def accepted_while(listening: socket.socket, tee: ZmqStream) -> socket.socket:
    listening.settimeout(0.05)
    while True:
        with contextlib.suppress(TimeoutError):
            return listening.accept()[0]
        tee.is_connected()


def proves(connection: socket.socket, proven: list[bool]) -> None:
    connection.settimeout(2.0)
    with contextlib.suppress(OSError, AssertionError):
        prove(connection, "gpu")
        proven.append(True)


def test_a_stranger_who_hangs_up_whoever_connects_is_named_at_the_end_of_the_wait(stack, endpoint):
    with listen_at(endpoint) as listening:
        tee = stack.enter_context(end(endpoint, "tee"))
        assert tee.stranger() is None
        # More than count: some end before this side has looked.
        for _ in range(3 * MAX_VAIN):
            accepted_while(listening, tee).close()
            assert tee.receive(SLICE_NS) is None
    for _ in range(10):
        assert tee.receive(SLICE_NS) is None
    error = tee.stranger()
    assert isinstance(error, ConfigError)
    assert error.value == endpoint
    if endpoint.startswith("ipc"):
        Path(endpoint.removeprefix("ipc://")).unlink()


# In the middle.


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def relay(endpoint: str, gpu_may_bind: int) -> None:
    """Takes the TEE's connection, leaves the port to the GPU process, and passes on what each of them says."""
    become_nobody()
    with listen_at(endpoint) as listening:
        tee, _ = listening.accept()
    os.write(gpu_may_bind, b"x")
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            gpu = connect_to(endpoint)
            break
    other = {tee: gpu, gpu: tee}
    with tee, gpu, contextlib.suppress(ConnectionError):
        while True:
            for source in select.select([tee, gpu], [], [])[0]:
                data = source.recv(4096)
                if not data:
                    return
                other[source].sendall(data)


@needs_root
def test_another_user_who_relays_between_the_two_proves_nothing(stack, forked):
    endpoint = free_tcp_endpoint()
    has_tee, gpu_may_bind = os.pipe()
    child = forked(relay, endpoint, gpu_may_bind)
    tee = stack.enter_context(end(endpoint, "tee"))
    os.read(has_tee, 1)
    gpu = stack.enter_context(end(endpoint, "gpu"))
    with pytest.raises(ConfigError, match="has not proved to be of it"):
        while not tee.is_connected() or not gpu.is_connected():
            gpu.is_connected()
    for _ in range(10):
        assert gpu.receive(SLICE_NS) is None
    assert not gpu.is_connected()
    tee.close()
    child.join()
    os.close(has_tee)
    os.close(gpu_may_bind)


# Paths and names.


@pytest.mark.parametrize(
    "endpoint",
    ["ipc://@tsqp", "ipc://@", "ipc://*", "ipc://", "tcp://127.0.0.1:0", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:*",
     "tcp://0.0.0.0:5000", "tcp://localhost:5000", "ipc:///tmp/a\x1b[2J"],
)  # fmt: skip
def test_an_endpoint_that_others_can_have_is_refused(endpoint):
    with pytest.raises(ConfigError, match="endpoint"):
        require_endpoint(endpoint)
    with pytest.raises(ConfigError, match="endpoint"):
        LLM("nowhere", endpoint=endpoint, start_gpu=False)


def test_only_this_user_may_connect_to_a_path(runtime_folder):
    path = runtime_folder / secrets.token_hex(4)
    before = os.umask(0)
    try:
        with end(f"ipc://{path}", "gpu"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize("role", ["tee", "gpu"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_folder_in_which_others_may_put_a_socket_is_refused(tmp_path, role, below):
    (tmp_path / f"open{below}").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="no other user"):
        ZmqStream(f"ipc://{tmp_path}/open{below}/bell", role, SECRET)
    (tmp_path / "open").chmod(0o1777)
    ZmqStream(f"ipc://{tmp_path}/open{below}/bell", role, SECRET).close()


@needs_root
@pytest.mark.parametrize("role", ["tee", "gpu"])
def test_a_socket_of_another_user_is_refused_with_its_owner(runtime_folder, role):
    path = runtime_folder / secrets.token_hex(4)
    with listen_at(f"ipc://{path}"):
        os.chown(path, NOBODY, NOBODY)
        with pytest.raises(ConfigError, match=f"belongs to user {NOBODY}"):
            ZmqStream(f"ipc://{path}", role, SECRET)
    assert path.exists()
    path.unlink()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_that_somebody_uses_and_does_not_look_at_is_left_alone(runtime_folder, kind):
    path = runtime_folder / secrets.token_hex(4)
    with socket.socket(socket.AF_UNIX, kind) as theirs, contextlib.ExitStack() as stack:
        theirs.bind(str(path))
        if kind == socket.SOCK_STREAM:
            # Its queue is full, so that an ordinary connection would wait.
            theirs.listen(0)
            for _ in range(2):
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    waiting.connect(str(path))
        with pytest.raises(ConfigError, match="live session"):
            ZmqStream(f"ipc://{path}", "gpu", SECRET)
    assert path.exists()
    path.unlink()


@pytest.mark.parametrize("has_met", [True, False], ids=["after it has proved itself", "before"])
def test_the_socket_of_a_killed_gpu_process_goes_with_its_session(runtime_folder, stack, forked, has_met):
    """A file that somebody has at the endpoint of a session without a GPU process stays."""
    met, alone = (runtime_folder / secrets.token_hex(4) for _ in range(2))
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(alone))
    for path in (met, alone):
        with Session.begin(endpoint=f"ipc://{path}") as session:
            memory = stack.enter_context(closing(session.create_memory(layout.SLOTS_OFFSET_BYTES)))
            tee = stack.enter_context(closing(session.open_waker()))
            if path == met:
                secret = take_secret(memory.buffer)
                child = forked(stays_until_killed, f"ipc://{path}", secret if has_met else SECRET)
                with contextlib.suppress(ConfigError):
                    while not tee.is_connected():
                        pass
                child.kill()
                assert met.exists()
    assert (met.exists(), alone.exists()) == (False, True)
    alone.unlink()


def stays_until_killed(endpoint: str, secret: bytes) -> None:
    gpu = ZmqStream(endpoint, "gpu", secret)
    while True:
        gpu.wait(SLICE_NS)


# A whole session.


@needs_root
@pytest.mark.parametrize("doorbell", ["zmq", "adaptive"])
def test_another_user_at_the_port_is_believed_nothing(forked, doorbell):
    """He answers whatever is said to him, and is told of no record."""
    endpoint = free_tcp_endpoint()
    listening = listen_at(endpoint)

    def impostor():
        become_nobody()
        connection, _ = listening.accept()
        said = b""
        while data := connection.recv(4096):
            said += data
            connection.sendall(os.urandom(layout.RECORD_BYTES))
        assert len(said) <= NONCE_BYTES + PROOF_BYTES

    child = forked(impostor)
    listening.close()
    with pytest.raises(ConfigError, match="has not proved to be of it"):
        LLM(
            model_folder(RandomModel("llama")), start_gpu=False, doorbell=doorbell, endpoint=endpoint, timeout_s=10,
            max_model_len=64,
        )  # fmt: skip
    child.join()


@pytest.mark.parametrize("doorbell", ["zmq", "adaptive"])
def test_a_session_over_tcp_comes_up_among_strangers(fast, doorbell):
    endpoint = free_tcp_endpoint()
    is_over = threading.Event()

    def knock():
        for number in itertools.count():
            if is_over.is_set():
                return
            with contextlib.suppress(OSError), connect_to(endpoint) as stranger:
                stranger.sendall(bytes(number % 300))
            time.sleep(0.002)

    knocking = threading.Thread(target=knock)
    knocking.start()
    try:
        with fast.llm(
            model_folder(RandomModel("llama")), doorbell=doorbell, endpoint=endpoint, max_model_len=64
        ) as llm:
            outputs = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True, temperature=0))
            assert len(outputs[0].outputs[0].token_ids) == 8
    finally:
        is_over.set()
        knocking.join()
