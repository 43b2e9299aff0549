"""What a hostile GPU process can do to the TEE: end the session with an error that says why, and nothing else."""

from __future__ import annotations

import itertools
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoints import free_tcp_endpoint
from hostile_gpu import FAULT_STEP, FIELDS, MISBEHAVIOURS, READY_LATE_S, HostileGpu
from models import RandomModel, model_folder, random_token_ids

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import PeerDied, PeerTimeout, ProtocolError, TsqpError
from tsqp_shm.shm.protocol import Opcode, Record, pack_identity

# Three tiles, two of them in flight.
PROMPT = list(random_token_ids(40))
TOKENS = 5
# Long enough for a busy machine: only two misbehaviours wait for its end.
TIMEOUT_S = 2.0
IN_ARENA = ("adaptive", "spin")
ALL = ("adaptive", "spin", "zmq")
SESSION_NAMES = (f"hostile{os.getpid()}-{number}" for number in itertools.count())

Outcome = tuple[TsqpError | None, int]


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


@pytest.fixture
def against(server, model, forked) -> Callable[..., None]:
    """Runs a TEE in a process of its own against a misbehaviour, and `check(error, number of tokens)` there."""

    def run(misbehaviour: str, check: Callable[[TsqpError | None, int], None], **config: Any) -> None:
        session = next(SESSION_NAMES)
        server.start(str(model), session, misbehaviour)
        forked(lambda: check(*outcome(model, session, **config))).join()

    return run


def outcome(model: Path, session: str, **config: Any) -> Outcome:
    """The error that ended the session, and how many tokens were given out."""
    limits, prompt = {"tile_rows": 16, "max_model_len": 100}, PROMPT
    if config.get("mode") == "verified":
        # Tiles are as they are there: three blocks, of which others are in flight while one is looked at.
        limits, prompt = {"block_rows": 128, "max_model_len": 400}, PROMPT * 8
    llm = LLM(
        model, start_gpu=False, session=session, timeout_s=TIMEOUT_S, tee_threads=2,
        **limits, **config,
    )  # fmt: skip
    with llm:
        completion = llm.start(prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0))
        try:
            for _ in llm.stream_completion(completion):
                pass
        except TsqpError as error:
            tokens = len(completion.token_ids)
            with pytest.raises(type(error)):
                llm.generate([[1]])
            return error, tokens
        return None, len(completion.token_ids)


def ends_with(kind: type[TsqpError], words: str, step: int = FAULT_STEP) -> Callable[[TsqpError | None, int], None]:
    """No token comes of the forward pass in which the fault lies, nor of a later one."""

    def check(error: TsqpError | None, tokens: int) -> None:
        assert type(error) is kind, error
        assert words in str(error)
        assert tokens == step - 1

    return check


def completes(error: TsqpError | None, tokens: int) -> None:
    assert error is None, error
    assert tokens == TOKENS


def completes_or_ends_with(*kinds: type[TsqpError]) -> Callable[[TsqpError | None, int], None]:
    """For what is random: whatever comes of it, it is one of these and no crash."""

    def check(error: TsqpError | None, tokens: int) -> None:
        assert error is None or type(error) in kinds, error
        assert FAULT_STEP - 1 <= tokens <= TOKENS

    return check


@pytest.mark.parametrize("doorbell", ALL)
def test_false_results_are_not_noticed(against, doorbell):
    """Finite and in their place: mode `plain` has nothing to tell them by. (The measure for all others.)"""
    against("none", completes, doorbell=doorbell)


@pytest.mark.parametrize(
    ("misbehaviour", "doorbell", "expected"),
    [
        ("late", "adaptive", ends_with(PeerTimeout, "waiting for QKV on slot ")),
        ("silent", "zmq", ends_with(PeerTimeout, "waiting for SCORES on slot ")),
        ("drip", "adaptive", ends_with(PeerTimeout, "one step, ")),
        ("failed", "adaptive", ends_with(PeerDied, "DOWN failed")),
        ("vanish", "adaptive", ends_with(PeerDied, "no heartbeat")),
        ("stop", "zmq", ends_with(PeerDied, "was stopped")),
        ("pause", "adaptive", completes),
    ],
)
def test_a_wait_ends(against, misbehaviour, doorbell, expected):
    against(misbehaviour, expected, doorbell=doorbell)


@pytest.mark.parametrize("doorbell", ALL)
@pytest.mark.parametrize(
    ("misbehaviour", "expected"),
    [
        ("twice", ends_with(ProtocolError, "sequence")),
        ("out-of-order", ends_with(ProtocolError, "sequence", step=1)),
        ("rejected", ends_with(ProtocolError, "DOWN rejected")),
        ("boast", completes),
    ],
)
def test_an_answer_that_is_not_due_is_refused(against, misbehaviour, doorbell, expected):
    against(misbehaviour, expected, doorbell=doorbell)


@pytest.mark.parametrize("doorbell", ALL)
def test_a_gpu_process_without_a_heartbeat_is_never_ready(server, model, forked, doorbell):
    """It answers READY in form, late, and has not written into the arena: no more is waited for it, nor is it asked to
    stop."""

    def open_llm():
        started = time.monotonic()
        with pytest.raises(PeerTimeout, match="heartbeat in the arena"):
            LLM(model, start_gpu=False, session=session, timeout_s=TIMEOUT_S, max_model_len=100, doorbell=doorbell)
        assert time.monotonic() - started < READY_LATE_S + TIMEOUT_S

    session = next(SESSION_NAMES)
    server.start(str(model), session, "no-pulse")
    forked(open_llm).join()


@pytest.mark.parametrize("field", FIELDS)
def test_an_answer_that_differs_in_one_field_is_refused(against, field):
    """Another epoch, another layer's result, slots and rows out of range."""
    against(f"wrong-{field}", ends_with(ProtocolError, f": {field}: expected"))


@pytest.mark.parametrize("misbehaviour", ["nan", "nan-scores", "infinity", "nan-logits"])
def test_no_token_is_drawn_from_what_is_not_finite(against, misbehaviour):
    against(misbehaviour, ends_with(ProtocolError, "logits: expected finite numbers"))


@pytest.mark.parametrize(
    ("misbehaviour", "dtype", "where"),
    [
        ("nan", "bfloat16", "result of QKV in layer 0"),
        ("nan-scores", "float32", "result of SCORES in layer 0"),
        ("infinity", "float32", "result of GATE_UP in layer 0"),
        ("infinity-later", "bfloat16", "result of DOWN in layer 1"),
        ("nan-logits", "bfloat16", "result of LM_HEAD: "),
    ],
)
def test_check_finite_names_the_operation_that_began_it(against, misbehaviour, dtype, where):
    against(misbehaviour, ends_with(ProtocolError, where), check_finite=True, dtype=dtype)


@pytest.mark.parametrize("doorbell", IN_ARENA)
@pytest.mark.parametrize(
    ("misbehaviour", "word"),
    [
        ("head-ahead", "ring head"),
        ("head-behind", "ring head"),
        ("tail-ahead", "ring tail"),
        ("tail-behind", "ring tail"),
    ],
)
def test_a_ring_position_out_of_range_is_refused(against, misbehaviour, word, doorbell):
    against(misbehaviour, ends_with(ProtocolError, word), doorbell=doorbell)


@pytest.mark.parametrize(
    ("misbehaviour", "doorbell", "expected"),
    [
        ("scribble-slots", "adaptive", completes_or_ends_with(ProtocolError)),
        ("scribble-slots", "zmq", completes_or_ends_with(ProtocolError)),
        ("scribble-rings", "adaptive", completes_or_ends_with(ProtocolError, PeerTimeout)),
        ("scribble-rings", "spin", completes_or_ends_with(ProtocolError, PeerTimeout)),
        ("scribble-rings", "zmq", completes),
        ("scribble-header", "adaptive", completes),
        ("scribble-all", "adaptive", completes_or_ends_with(ProtocolError, PeerTimeout)),
        ("flip-flags", "adaptive", completes),
        ("flip-flags", "zmq", completes),
    ],
)
def test_memory_that_changes_under_the_tee_does_not_crash_it(against, misbehaviour, doorbell, expected):
    against(misbehaviour, expected, doorbell=doorbell)


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
@pytest.mark.parametrize(
    ("misbehaviour", "doorbell", "expected"),
    [
        ("junk", "adaptive", completes),
        ("junk", "zmq", ends_with(ProtocolError, "sequence")),
        ("flood", "adaptive", completes),
        ("flood", "zmq", ends_with(ProtocolError, "sequence")),
        ("hang-up", "adaptive", ends_with(PeerTimeout, "QKV")),
        ("hang-up", "zmq", ends_with(PeerTimeout, "QKV")),
    ],
)
def test_junk_in_the_socket_neither_steers_nor_fills_the_tee(against, misbehaviour, doorbell, expected, scheme):
    def check(error: TsqpError | None, tokens: int) -> None:
        expected(error, tokens)
        # The flood is hundreds of megabytes where nothing holds it back.
        assert resident_bytes() - before < 64 << 20

    before = resident_bytes()
    endpoint = None if scheme == "ipc" else free_tcp_endpoint()
    against(misbehaviour, check, doorbell=doorbell, endpoint=endpoint)


@pytest.mark.parametrize("doorbell", ALL)
@pytest.mark.parametrize("misbehaviour", ["truncate", "truncate-slots", "truncate-logits"])
def test_a_truncated_arena_ends_the_session_and_not_the_process(against, misbehaviour, doorbell):
    against(misbehaviour, ends_with(ProtocolError, "cut the object short"), doorbell=doorbell)


@pytest.mark.parametrize("doorbell", ALL)
def test_an_arena_truncated_at_any_moment_ends_the_session(against, doorbell):
    def check(error: TsqpError | None, tokens: int) -> None:
        assert error is None or "cut the object short" in str(error), error

    against("truncate-sometime", check, doorbell=doorbell)


@pytest.mark.parametrize(
    ("misbehaviour", "doorbell", "expected"),
    [
        ("punch-slots", "adaptive", completes),
        ("punch-slots", "zmq", completes),
        ("punch", "zmq", completes),
        ("punch", "adaptive", completes_or_ends_with(ProtocolError, PeerTimeout, PeerDied)),
    ],
)
def test_holes_in_the_arena_are_zeros(against, misbehaviour, doorbell, expected):
    against(misbehaviour, expected, doorbell=doorbell)


def test_an_unlinked_arena_is_still_mapped(against):
    against("unlink", completes)


@pytest.mark.parametrize("doorbell", IN_ARENA)
def test_a_close_during_a_long_operation_tells_a_gpu_process_of_somebody_elses_to_stop(model, forked, doorbell):
    """Where the TEE cannot wait for its answer either."""
    session = next(SESSION_NAMES)
    begun, tell = os.pipe()

    def serve_slowly():
        gpu = HostileGpu(model, session)
        gpu.answer(gpu.receive(), value=pack_identity(os.getpid(), None, "in place"))
        while (record := gpu.receive()).opcode != Opcode.QKV:
            gpu.answer(record)
        os.write(tell, b"x")
        with pytest.raises(PeerDied):
            gpu.until_the_tee_ends()
        submitted = [Record.unpack(data).opcode for data in iter(gpu.doorbell.take, None)]
        assert submitted[-1] == Opcode.STOP

    def ask():
        with pytest.raises(TsqpError, match="closed"):
            llm.generate([PROMPT])

    child = forked(serve_slowly)
    os.close(tell)
    llm = LLM(model, start_gpu=False, session=session, timeout_s=30.0, max_model_len=100, doorbell=doorbell)
    asking = threading.Thread(target=ask)
    asking.start()
    os.read(begun, 1)
    os.close(begun)
    llm.close()
    asking.join()
    child.join()


def test_every_misbehaviour_has_a_test():
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_hostile_gpu*.py"))
    missing = [name for name in MISBEHAVIOURS if f'"{name}"' not in source and not name.startswith("wrong-")]
    assert missing == []


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
