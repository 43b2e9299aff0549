"""A whole session in one process: what it computes, and how it ends, is what two processes do."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from local_session import LocalGpus
from models import CONFIG_CLASSES, RandomModel, model_folder, random_token_ids, token_ids

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.config import DOORBELLS
from tsqp_shm.errors import ArenaMismatch, DeviceError, PeerDied
from tsqp_shm.gpu import plain, worker
from tsqp_shm.gpu.step import Step
from tsqp_shm.roles.thread import RoleThread
from tsqp_shm.shm import layout, liveness
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.local import LocalTransport
from tsqp_shm.shm.observer import Observer
from tsqp_shm.shm.plan import Plan
from tsqp_shm.tee.completion import Completion

PROMPTS = [list(random_token_ids(count, seed=count)) for count in (3, 40, 70)]
SMALL = {"tile_rows": 16, "block_rows": 16, "max_model_len": 128}
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)
PLAN = Plan.of_slots([("x", "float32", 1, 1)])


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


@pytest.fixture
def gpus(model) -> Iterator[LocalGpus]:
    gpus = LocalGpus(model)
    yield gpus
    assert not [thread for thread in gpus.threads if thread.is_alive]


def answers(llm: LLM, prompts: list[list[int]]) -> tuple[list[list[int]], np.ndarray]:
    return token_ids(llm.generate(prompts, GREEDY)), llm.logits(prompts[-1])


@pytest.mark.parametrize("family", CONFIG_CLASSES)
def test_a_random_model_answers_as_in_two_processes(fast, family):
    folder = model_folder(RandomModel(family))
    with fast.llm(folder, **SMALL) as llm:
        expected_tokens, expected_logits = answers(llm, PROMPTS)
    with LocalGpus(folder).llm(**SMALL) as llm:
        found_tokens, found_logits = answers(llm, PROMPTS)
    assert found_tokens == expected_tokens
    # Odd widths are the tensor library's products, whose sums depend on its threads in the last bits of float32.
    np.testing.assert_allclose(found_logits, expected_logits, rtol=0, atol=1e-5)


def test_the_demo_model_answers_as_in_two_processes(fast, demo_model):
    with fast.llm(demo_model, max_model_len=128) as llm:
        prompts = [llm.tokenizer.encode("The capital of France is"), llm.tokenizer.encode("One, two, three,")]
        expected_tokens, expected_logits = answers(llm, prompts)
    with LocalGpus(demo_model).llm(max_model_len=128) as llm:
        found_tokens, found_logits = answers(llm, prompts)
    assert found_tokens == expected_tokens
    assert np.array_equal(found_logits, expected_logits)


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_every_doorbell_rings_between_two_threads(gpus, fast, model, doorbell):
    with fast.llm(model, doorbell=doorbell, **SMALL) as llm:
        expected = token_ids(llm.generate(PROMPTS, GREEDY))
    with gpus.llm(doorbell=doorbell, **SMALL) as llm:
        assert token_ids(llm.generate(PROMPTS, GREEDY)) == expected
        facts = llm.stats()
    assert (facts["session"], facts["arena"]["name"], facts["doorbell"]["endpoint"]) == ("(local)", "(local)", "")
    assert facts["processes"]["gpu"]["pid"] == os.getpid()


def test_a_session_leaves_no_thread_descriptor_or_mapping(model):
    def left() -> tuple[set[str], int, int]:
        maps = Path("/proc/self/maps").read_text()
        threads = {thread.name for thread in threading.enumerate()}
        return threads, len(list(Path("/proc/self/fd").iterdir())), maps.count("tsqp-shm")

    def run() -> None:
        with LocalGpus(model).llm(**SMALL) as llm:
            llm.generate(PROMPTS, GREEDY)

    # What a first session loads stays.
    run()
    before = left()
    run()
    assert left() == before


def test_the_steps_may_be_the_test_s_own(gpus, model):
    told = []
    with gpus.runtime(**SMALL) as runtime:
        completion = Completion(PROMPTS[1], GREEDY, GREEDY.max_tokens, frozenset(), None, vocab_size=257)
        runtime.add([completion], told.append)
        steps = 1
        while runtime.step():
            steps += 1
    assert steps == GREEDY.max_tokens
    assert [len(update.token_ids) for update in told] == [1] * GREEDY.max_tokens


def break_in_a_step(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the GPU role end by an error at the second step."""
    steps = 0
    begin = Step.begin

    def begin_or_break(step, record):
        nonlocal steps
        steps += 1
        if steps == 2:
            raise error
        return begin(step, record)

    monkeypatch.setattr(Step, "begin", begin_or_break)


def test_what_the_gpu_role_ends_by_is_what_the_tee_reports(gpus, monkeypatch):
    break_in_a_step(ZeroDivisionError("by a test"), monkeypatch)
    with gpus.llm(**SMALL) as llm, pytest.raises(PeerDied, match="ZeroDivisionError") as caught:
        llm.generate(PROMPTS, GREEDY)
    assert caught.value.last_words == "by a test"


def test_an_error_that_the_caller_can_mend_is_reported_as_itself(gpus, monkeypatch):
    monkeypatch.setattr(plain, "load_weights", refuse)
    with pytest.raises(DeviceError, match="too small for a test"):
        gpus.llm(**SMALL)


def refuse(*arguments: object) -> None:
    raise DeviceError("cpu", "too small for a test")


def test_when_the_session_has_come_up_it_is_a_death_whatever_it_is_called(gpus, monkeypatch):
    break_in_a_step(DeviceError("cpu", "by a test"), monkeypatch)
    with gpus.llm(**SMALL) as llm, pytest.raises(PeerDied, match="DeviceError") as caught:
        llm.generate(PROMPTS, GREEDY)
    assert caught.value.last_words == "device cpu: by a test"


def test_a_gpu_role_that_falls_silent_is_a_death(gpus, monkeypatch):
    """Its thread hangs, and its heartbeat, which is a native thread's, has ended."""
    woken = threading.Event()
    begin = worker._native.Heartbeat

    def beat_once(buffer, role, interval_ms):
        heartbeat = begin(buffer, role, interval_ms)
        if role == "gpu":
            while not worker._native.load_word(buffer, layout.GPU_HEARTBEAT_OFFSET_BYTES):
                os.sched_yield()
            heartbeat.release()
        return heartbeat

    monkeypatch.setattr(worker._native, "Heartbeat", beat_once)
    monkeypatch.setattr(worker.Worker, "run", lambda worker: woken.wait(20))
    # A holder of the role would be told of its end, and gives its silence longer.
    monkeypatch.setattr(liveness, "TOLD_SILENCE_S", liveness.SILENCE_S)
    try:
        with pytest.raises(PeerDied, match="no heartbeat"):
            gpus.llm(**SMALL)
    finally:
        woken.set()
    gpus.threads[0].stop()


def test_another_gpu_role_goes_on_where_one_has_died(gpus, fast, model, monkeypatch):
    with fast.llm(model, **SMALL) as llm:
        expected = token_ids(llm.generate(PROMPTS, GREEDY))
    break_in_a_step(ZeroDivisionError("by a test"), monkeypatch)
    with gpus.llm(restart_gpu=1, **SMALL) as llm:
        assert token_ids(llm.generate(PROMPTS, GREEDY)) == expected
    assert len(gpus.threads) == 2


def test_a_session_that_does_not_come_up_ends_who_waits_to_join_it(gpus):
    with pytest.raises(ArenaMismatch, match="by a test"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arena, "publish", refuse_to_publish)
        gpus.llm(**SMALL)
    gpus.threads[0].stop()
    assert isinstance(gpus.threads[0].death(), PeerDied)


def refuse_to_publish(arena: Arena, invitation: bytes) -> None:
    raise ArenaMismatch(arena.name, "by a test", 1, 2)


def test_a_glance_shows_a_session_within_one_process(gpus):
    with gpus.llm(**SMALL) as llm:
        llm.generate(PROMPTS, GREEDY)
        with closing(Observer("local", gpus.transport)) as observer:
            look = observer.look()
            assert look.progress.generated == len(PROMPTS) * GREEDY.max_tokens
            assert not look.in_flight
    assert observer.is_gone


def test_both_sides_have_a_mapping_of_their_own_of_the_same_bytes():
    transport = LocalTransport()
    hold = transport.begin()
    with Arena.create(hold.create_memory(PLAN.total_bytes), PLAN, 5) as tee:
        tee.publish(b"come in")
        with closing(transport.glance()) as glance:
            assert glance.read() == tee.buffer[: layout.SLOTS_OFFSET_BYTES]
    hold.end()


def test_a_role_that_ends_well_has_died_too_for_who_waits_for_it():
    thread = RoleThread.start("gpu", lambda: None)
    thread.stop()
    assert str(thread.death()) == "the gpu process died (its thread ended)"
