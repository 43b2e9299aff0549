"""What a hostile GPU process can do to several callers who share its batches: the same to all of them, and no more."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from callers import told_of
from hostile_gpu import FAULT_STEP
from models import RandomModel, random_token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import PeerDied, PeerTimeout, ProtocolError, TsqpError
from tsqp_shm.tee.updates import Update

# At the step of the fault some of them decode, the longest has a chunk of its prompt, and one waits for a place.
PROMPTS = [list(random_token_ids(length, seed=length)) for length in (3, 1, 17, 110, 9, 30)]
LIMITS = {"max_num_seqs": 5, "max_batch_tokens": 48, "tile_rows": 16, "max_model_len": 128, "tee_threads": 2}
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
SESSION_NAMES = (f"batches{os.getpid()}-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model whose tokens are bytes, so that every one makes a piece of text."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return RandomModel("llama").write(folder)


@pytest.fixture
def against(server, model, forked) -> Callable[..., None]:
    """Runs `check(llm)` in a process of its own, whose GPU process misbehaves."""

    def run(misbehaviour: str, check: Callable[[LLM], None], **config: Any) -> None:
        session = next(SESSION_NAMES)
        server.start(str(model), session, misbehaviour)

        def play() -> None:
            with LLM(model, start_gpu=False, session=session, **LIMITS, **config) as llm:
                check(llm)

        forked(play).join()

    return run


def ask_for_all(llm: LLM) -> tuple[list[list[Update]], int]:
    """What each caller is told until its last update, and how many tokens there were before the fault's step."""
    told: list[SimpleQueue[Update]] = [SimpleQueue() for _ in PROMPTS]
    completions = [llm.start(prompt, PARAMS) for prompt in PROMPTS]
    queue_of = dict(zip(completions, told, strict=True))
    # All from the same step on.
    llm.runtime.add(completions, lambda update: queue_of[update.completion].put(update))
    updates = [told_of(llm, completion, queue) for completion, queue in zip(completions, told, strict=True)]
    assert all(queue.empty() for queue in told)
    assert [completion.token_ids for completion in completions] == [
        [token for update in mine for token in update.token_ids] for mine in updates
    ]
    return updates, llm.statistics.steps


@pytest.mark.parametrize(
    ("misbehaviour", "doorbell", "kind", "words"),
    [
        ("nan-first-row", "adaptive", ProtocolError, "logits: expected finite numbers"),
        ("nan-last-row", "zmq", ProtocolError, "logits: expected finite numbers"),
        ("wrong-epoch", "adaptive", ProtocolError, ": epoch: expected"),
        ("wrong-sequence", "spin", ProtocolError, ": sequence: expected"),
        ("twice", "adaptive", ProtocolError, "sequence"),
        ("drip", "spin", PeerTimeout, "one step, "),
        ("late", "adaptive", PeerTimeout, "waiting for QKV on slot "),
        ("vanish", "adaptive", PeerDied, "no heartbeat"),
    ],
)
def test_a_fault_is_everybody_s_and_nobody_gets_a_token_of_its_pass(against, misbehaviour, doorbell, kind, words):
    def check(llm: LLM) -> None:
        updates, steps = ask_for_all(llm)
        errors = [mine[-1].error for mine in updates]
        assert {(type(error), str(error)) for error in errors} == {(kind, str(errors[0]))}
        assert words in str(errors[0])
        # Each its own: what one caller raises must not get another's traceback.
        assert len({id(error) for error in errors}) == len(PROMPTS)
        assert all(update.error is None for mine in updates for update in mine[:-1])
        # At most a token a step, of the steps before: the short prompts have one of each.
        given = [sum(len(update.token_ids) for update in mine) for mine in updates]
        assert steps == FAULT_STEP - 1
        assert given[:3] == [steps] * 3
        assert sum(given) == llm.statistics.generated
        with pytest.raises(kind):
            llm.generate(PROMPTS, PARAMS)

    against(misbehaviour, check, doorbell=doorbell, timeout_s=2.0)


def test_a_stream_gives_out_nothing_once_another_caller_knows_of_the_fault(against):
    """Though the token of a good step lies ready for it."""

    def check(llm: LLM) -> None:
        completion = llm.start(PROMPTS[0], PARAMS)
        stream = llm.stream_completion(completion)
        assert next(stream)
        with pytest.raises(ProtocolError):
            llm.generate(PROMPTS, PARAMS)
        assert len(completion.token_ids) == FAULT_STEP - 1
        with pytest.raises(ProtocolError):
            next(stream)

    against("nan-last-row", check, timeout_s=10.0)


def test_a_deadline_ends_the_wait_in_the_middle_of_a_step(against):
    """Each operation of the step takes 3 s; those that have no deadline go on waiting, and closing ends that."""

    def check(llm: LLM) -> None:
        begun_s = time.monotonic()
        open_end = llm.stream(PROMPTS[1], PARAMS)
        late = SamplingParams(max_tokens=12, ignore_eos=True, deadline_s=1.0, temperature=0)
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, late)]
        took_s = time.monotonic() - begun_s
        assert [output.finish_reason for output in outputs] == ["deadline"] * len(PROMPTS)
        assert len(outputs[0].token_ids) == FAULT_STEP - 1
        # A step is a dozen operations.
        assert took_s < 12
        open_end.close()
        assert llm.runtime.fault is None

    against("drip-slowly", check, timeout_s=60.0)


def test_whoever_is_cancelled_in_the_middle_of_a_step_is_not_kept_waiting(against):
    def check(llm: LLM) -> None:
        begun_s = time.monotonic()
        stream = llm.stream(PROMPTS[0], PARAMS)
        queue: SimpleQueue[Update] = SimpleQueue()
        llm.runtime.add([llm.start(PROMPTS[1], PARAMS)], queue.put)
        for _ in range(FAULT_STEP - 1):
            llm.runtime.next_update(queue)
        stream.close()
        assert time.monotonic() - begun_s < 12

    against("drip-slowly", check, timeout_s=60.0)


def test_closing_in_the_middle_of_a_step_is_not_kept_waiting(against):
    def check(llm: LLM) -> None:
        queue: SimpleQueue[Update] = SimpleQueue()
        llm.runtime.add([llm.start(PROMPTS[1], PARAMS)], queue.put)
        for _ in range(FAULT_STEP - 1):
            llm.runtime.next_update(queue)
        begun_s = time.monotonic()
        llm.close()
        assert time.monotonic() - begun_s < 12
        with pytest.raises(TsqpError, match="this LLM is closed"):
            llm.runtime.next_update(queue)

    against("drip-slowly", check, timeout_s=60.0)
