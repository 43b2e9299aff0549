"""The runtime by hand: its steps are run by the test, so what lies between two of them can be looked at."""

from __future__ import annotations

import functools
import gc
import mmap
import os
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from models import FastStart, RandomModel, model_folder, random_token_ids

from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import RequestError, TraceError, TsqpError
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.liveness import LOOK_INTERVAL_S
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.runtime import Runtime
from tsqp_shm.tee.sampling_params import SamplingParams
from tsqp_shm.tee.scheduler import Reservation
from tsqp_shm.tee.updates import Update

LIMITS = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 1}


@pytest.fixture
def runtime(fast: FastStart) -> Iterator[Runtime]:
    with fast.runtime(model_folder(RandomModel("llama")), **LIMITS) as runtime:
        yield runtime


def completion(prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 10, **params) -> Completion:
    params = SamplingParams(**{"temperature": 0, "max_tokens": None, **params})
    return Completion(prompt, params, max_tokens, (), None, vocab_size=257)


def run(runtime: Runtime, asked: Completion) -> list[int]:
    runtime.add([asked], lambda update: None)
    while runtime.step():
        pass
    return asked.token_ids


def test_each_step_makes_one_token_and_one_update(runtime):
    updates: list[Update] = []
    asked = completion(max_tokens=4)
    runtime.add([asked], updates.append)
    for number in range(1, 5):
        runtime.step()
        assert [list(update.token_ids) for update in updates] == [[token] for token in asked.token_ids]
        assert len(updates) == number
    assert [update.finish_reason for update in updates] == [None, None, None, "length"]
    assert not runtime.step()


def test_a_deadline_ends_a_completion_and_frees_its_place(runtime):
    alone = run(runtime, completion((4, 5)))
    updates: list[Update] = []
    late, waiting = completion(deadline_s=1000), completion((4, 5))
    runtime.add([late], updates.append)
    runtime.add([waiting], updates.append)
    runtime.step()
    runtime.step()
    # As if it had been asked for long ago.
    late.started_s -= 2000
    while runtime.step():
        pass
    assert (late.finish_reason, len(late.token_ids)) == ("deadline", 2)
    assert waiting.token_ids == alone
    assert [update.finish_reason for update in updates if update.completion is late] == [None, None, "deadline"]


def test_a_cancelled_completion_frees_its_place_at_the_next_step(runtime):
    alone = run(runtime, completion((4, 5)))
    first, second = completion(), completion((4, 5))
    runtime.add([first, second], lambda update: None)
    runtime.step()
    runtime.cancel([first])
    while runtime.step():
        pass
    assert (first.finish_reason, len(first.token_ids)) == ("cancelled", 1)
    assert second.token_ids == alone


def test_what_is_added_together_is_one_batch_from_the_first_step_on(fast):
    with fast.runtime(model_folder(RandomModel("llama")), dtype="float32", max_model_len=64) as runtime:
        asked = [completion((number, 2)) for number in range(5)]
        runtime.add(asked, lambda update: None)
        runtime.step()
        assert [len(one.token_ids) for one in asked] == [1] * 5
        assert runtime.load().running == 5


def test_logits_wait_for_a_place_and_give_it_back(runtime):
    ids = random_token_ids(20)
    with runtime.sequence() as sequence:
        expected = runtime.forward(sequence, ids)
        waiting = completion()
        runtime.add([waiting], lambda update: None)
        # The only cache is reserved, so there is nothing that a step could do.
        assert not runtime.step()
        assert waiting.token_ids == []
    while runtime.step():
        pass
    assert len(waiting.token_ids) == 10
    running = completion()
    runtime.add([running], lambda update: None)
    runtime.step()
    with runtime.sequence() as sequence:
        assert running.finish_reason == "length"
        assert np.array_equal(runtime.forward(sequence, ids), expected)
    assert runtime.load().free_sequences == 1


def test_whoever_can_be_told_no_more_harms_nobody(fast):
    """An event loop that was closed, say: its completion is cancelled, and the others go on."""

    def told(update: Update) -> None:
        raise RuntimeError("Event loop is closed")

    with fast.runtime(model_folder(RandomModel("llama")), dtype="float32", max_model_len=64) as runtime:
        alone = run(runtime, completion((4, 5)))
        lost, kept = completion(), completion((4, 5))
        runtime.add([lost], told)
        runtime.add([kept], lambda update: None)
        while runtime.step():
            pass
        assert (lost.finish_reason, len(lost.token_ids)) == ("cancelled", 1)
        assert kept.token_ids == alone
        runtime.add([completion()], told)
    assert runtime.has_ended


def test_a_fault_in_one_row_gives_out_no_token_of_the_pass(fast, monkeypatch):
    updates: list[Update] = []
    with fast.runtime(model_folder(RandomModel("llama")), dtype="float32", max_model_len=64) as runtime:
        asked = [completion((number, 2)) for number in range(3)]
        runtime.add(asked, updates.append)
        runtime.step()
        updates.clear()
        monkeypatch.setattr(asked[2], "sampler", None)
        assert not runtime.step()
    assert [len(one.token_ids) for one in asked] == [1, 1, 1]
    assert [update.token_ids for update in updates] == [()] * 3
    assert all(str(update.error).startswith("a step failed: TypeError") for update in updates)


def test_a_cache_whose_holder_was_interrupted_is_given_back(runtime):
    """As early as the block that would give it back: only the reservation itself is left to do it."""
    given: list[Reservation] = []
    reservation = Reservation(given.append)
    reservation.give(3)
    del reservation
    assert [lost.sequence for lost in given] == [3]
    given[0].sequence = None
    with pytest.raises(ZeroDivisionError), runtime.sequence():
        raise ZeroDivisionError
    assert runtime.load().free_sequences == 1


def test_a_mistake_of_one_caller_is_an_error_of_its_own(runtime):
    alone = run(runtime, completion((4, 5)))
    with runtime.sequence() as sequence:
        for ids in ([], [257], [-1], [1] * 65, ["a"]):
            with pytest.raises(RequestError):
                runtime.forward(sequence, ids)
    with pytest.raises(RequestError, match="sequence"):
        runtime.forward(0, [1])
    asked = completion()
    for wrong in ((), (257,), (1,) * 64):
        with pytest.raises(RequestError):
            runtime.add([completion(wrong)], lambda update: None)
    of_another_model = Completion((1,), SamplingParams(), 10, (), None, vocab_size=258)
    with pytest.raises(RequestError, match="one of 258 tokens"):
        runtime.add([of_another_model], lambda update: None)
    run(runtime, asked)
    with pytest.raises(RequestError, match="before"):
        runtime.add([asked], lambda update: None)
    assert run(runtime, completion((4, 5))) == alone


def test_closing_hears_the_gpu_process_out(fast):
    """It says that it ends; only then is it let go of, or it would be told to end in the middle of that."""
    with fast.runtime(model_folder(RandomModel("llama")), **LIMITS) as runtime:
        run(runtime, completion())
        time.sleep(LOOK_INTERVAL_S)
    assert runtime.statistics.gpu["STOP"].calls == 1


def test_a_closed_runtime_tells_whoever_waits_and_refuses_the_rest(fast):
    updates: list[Update] = []
    with fast.runtime(model_folder(RandomModel("llama")), **LIMITS) as runtime:
        runtime.add([completion(), completion()], updates.append)
        runtime.step()
        updates.clear()
    assert [str(update.error) for update in updates] == ["this LLM is closed"] * 2
    with pytest.raises(TsqpError, match="closed"):
        runtime.add([completion()], updates.append)
    with pytest.raises(TsqpError, match="closed"), runtime.sequence():
        pass
    assert runtime.facts()["doorbell"]["rung"] > 0


def beneath(array: np.ndarray) -> object:
    """Whose memory its elements lie in."""
    owner: object = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner.obj if isinstance(owner, memoryview) else owner


def reachable_arrays(root: object) -> list[np.ndarray]:
    """Every array that an object holds, however deep; not what is the whole interpreter's."""
    arrays, seen, left = [], set(), [root]
    while left:
        found = left.pop()
        if id(found) in seen or isinstance(found, (types.ModuleType, type)):
            continue
        seen.add(id(found))
        if isinstance(found, np.ndarray):
            arrays.append(found)
        elif isinstance(found, types.FunctionType):
            left += [found.__closure__, found.__defaults__, found.__kwdefaults__]
        else:
            left += gc.get_referents(found)
    return arrays


@pytest.mark.parametrize("stored_as", ["float32", "bfloat16"])
def test_nothing_that_a_session_holds_is_a_view_of_a_file(fast, stored_as):
    """Who may write the model's files could change it, or end the process by cutting them short."""
    model = RandomModel("llama", stored_as=stored_as)
    with fast.runtime(model_folder(model), **LIMITS) as runtime:
        run(runtime, completion())
        arrays = reachable_arrays(runtime)
        private = [array for array in arrays if beneath(array) is not runtime.connection.arena.buffer]
        # Five norms, a pair of tables of rope, the residual.
        assert len(private) >= 8
        assert not [array.shape for array in private if isinstance(beneath(array), mmap.mmap)]


def test_an_error_at_the_end_of_one_that_was_dropped_is_a_warning(fast):
    def fail() -> None:
        raise TraceError("/trace", "cannot be made")

    model, before = model_folder(RandomModel("llama")), ExitStack()
    before.callback(fail)
    with Checkpoint.open(model) as checkpoint:
        transport = PosixTransport(f"warned{os.getpid()}")
        runtime = Runtime(
            ModelSpec.from_folder(model), checkpoint, EngineConfig(max_model_len=64), transport,
            functools.partial(fast.start_gpu, model), before=before,
        )  # fmt: skip
    runtime.start()
    with pytest.warns(RuntimeWarning, match="trace /trace: cannot be made"):
        runtime.leave()
        while not runtime.has_ended:
            time.sleep(0.01)
    runtime.close()


def test_steps_are_run_by_one_thread_or_by_the_caller_never_by_both(fast):
    with fast.runtime(model_folder(RandomModel("llama")), **LIMITS) as runtime:
        runtime.start()
        with pytest.raises(TsqpError, match="thread"):
            runtime.step()
