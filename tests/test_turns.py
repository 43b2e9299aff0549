"""Prompts take turns, and no more of them is computed in a step than their budget while anything decodes: counted, not
timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from models import FastStart, RandomModel, model_folder, random_token_ids
from test_blinded import ALL_CROSS, watched
from test_verified import answers

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import ConfigError, PadsExhausted
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.posix.register import PosixRegister
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.runtime import Runtime

ENDLESS = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0)
LIMITS = {"max_model_len": 256, "max_num_seqs": 6, "max_batch_tokens": 128}
BUDGET = 16


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


class Stepped:
    """A session whose steps the test runs, and the rows that each had."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def start(self, length: int, params: SamplingParams = ENDLESS) -> Completion:
        completion = Completion(
            random_token_ids(length, seed=length), params, params.max_tokens, (), None, vocab_size=257
        )
        self._runtime.add([completion], lambda update: None)
        return completion

    def step(self) -> int:
        before = self._runtime.statistics.tokens
        self._runtime.step()
        return self._runtime.statistics.tokens - before

    def streams(self, count: int) -> list[Completion]:
        """So many that decode."""
        started = [self.start(3) for _ in range(count)]
        self.step()
        assert all(len(each.token_ids) == 1 for each in started)
        return started


@contextmanager
def stepped(fast: FastStart, model: Path, mode: str = "tee-only", **config: object) -> Iterator[Stepped]:
    config = {**LIMITS, "prefill_budget": BUDGET, **config}
    if mode != "tee-only":
        with fast.runtime(model, mode=mode, **config) as runtime:
            yield Stepped(runtime)
        return
    with Checkpoint.open(model) as checkpoint:
        settings = EngineConfig(mode=mode, **config)
        runtime = Runtime(ModelSpec.from_folder(model), checkpoint, settings, PosixRegister("turns"), None)
    with closing(runtime):
        runtime.open()
        yield Stepped(runtime)


def lengths(completions: Sequence[Completion]) -> list[int]:
    return [len(each.token_ids) for each in completions]


@pytest.mark.parametrize("mode", ["plain", "blinded", "tee-only", pytest.param("verified", marks=pytest.mark.long)])
def test_while_a_prompt_is_computed_every_step_gives_every_stream_its_token(fast, model, mode):
    with stepped(fast, model, mode) as session:
        streams = session.streams(4)
        prompt = session.start(100)
        for number in range(1, 8):
            assert prompt.token_ids == []
            assert session.step() == len(streams) + (BUDGET if number < 7 else 100 - 6 * BUDGET)
            assert lengths(streams) == [1 + number] * 4
        assert lengths([prompt]) == [1]


def test_where_nothing_decodes_a_step_has_as_much_as_fits(fast, model):
    with stepped(fast, model) as session:
        prompts = [session.start(length) for length in (100, 60)]
        assert session.step() == 128
        assert lengths(prompts) == [1, 0]
        # Of the second prompt 32 are left, and the first one decodes.
        assert [session.step(), session.step()] == [1 + BUDGET, 1 + BUDGET]
        assert lengths(prompts) == [3, 1]


def test_without_a_budget_it_does_so_always(fast, model):
    with stepped(fast, model, prefill_budget=0) as session:
        session.streams(2)
        prompt = session.start(100)
        assert session.step() == 102
        assert lengths([prompt]) == [1]


def test_a_short_prompt_is_not_held_up_by_the_whole_of_a_long_one(fast, model):
    with stepped(fast, model) as session:
        session.streams(1)
        long = session.start(200)
        session.step()
        short = session.start(10)
        # What its turn leaves is the long one's.
        assert session.step() == 1 + BUDGET
        assert lengths([long, short]) == [0, 0]
        assert session.step() == 1 + BUDGET
        assert lengths([long, short]) == [0, 1]


def test_a_long_prompt_has_its_turn_however_many_short_ones_come(fast, model):
    with stepped(fast, model) as session:
        session.streams(1)
        long = session.start(150)
        once = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0)
        ended: list[Completion] = []
        steps = 0
        while not long.token_ids:
            # There is always one that has waited for less long.
            ended = [each for each in ended if each.finish_reason is None]
            ended += [session.start(BUDGET, once) for _ in range(4 - len(ended))]
            session.step()
            steps += 1
            assert steps < 60
        assert steps >= 150 / BUDGET


def test_turns_go_round(fast, model):
    with stepped(fast, model) as session:
        session.streams(1)
        prompts = [session.start(length) for length in (90, 80, 70)]
        done: list[list[int]] = []
        for _ in range(6):
            session.step()
            done.append([prompt.cached for prompt in prompts])
    assert done == [[16, 0, 0], [16, 16, 0], [16, 16, 16], [32, 16, 16], [32, 32, 16], [32, 32, 32]]


SCORED = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=1, prompt_logprobs=1)
PROMPTS = [list(random_token_ids(length, seed=length)) for length in (2, 3, 90, 5, 60, 17, 40, 1)]


@pytest.mark.parametrize("mode", ["tee-only", pytest.param("verified", marks=pytest.mark.long)])
def test_tokens_and_scores_do_not_depend_on_the_budget(fast, model, mode):
    said = []
    for budget in (0, 1, 13):
        settings = {"mode": mode, "max_model_len": 128, "max_num_seqs": 3, "prefill_budget": budget}
        with LLM(model, **settings) if mode == "tee-only" else fast.llm(model, **settings) as llm:
            said.append(answers(llm, SCORED, PROMPTS))
    assert said[0] == said[1] == said[2]


def test_prompts_that_are_rounded_to_one_length_have_the_same_turns(fast, model, monkeypatch):
    """Beside one that decodes, one after the other: what crosses, step by step."""
    told = []
    settings = {"max_model_len": 128, "max_num_seqs": 3, "max_batch_tokens": 64, "prefill_budget": 24, "block_rows": 8}
    for pair in ((33, 50), (64, 64), (40, 57)):
        with (
            watched(monkeypatch) as seen,
            stepped(fast, model, "blinded", **settings, **ALL_CROSS, pad_stock=400, pad_prompt_to=32) as session,
        ):
            stream = session.start(5)
            while not stream.token_ids:
                session.step()
            seen.clear()
            prompts = [session.start(length) for length in pair]
            rows = [session.step() for _ in range(8)]
            assert all(prompt.token_ids for prompt in prompts)
            told.append((list(seen), rows))
    assert told[0] == told[1] == told[2]


def test_pads_that_a_prompt_in_progress_will_need_are_not_promised_to_another(fast, model):
    """There are enough for the first one and what decodes, and not for the second beside it."""
    settings = {"pad_stock": 160, "pad_ready": 160, "pads_out": "refuse"}
    with stepped(fast, model, "blinded", **settings, prefill_budget=20, max_batch_tokens=64) as session:
        session.streams(1)
        first, second = session.start(100), session.start(90)
        while first.finish_reason is None and not first.token_ids:
            session.step()
        assert first.finish_reason is None
        assert isinstance(second.error, PadsExhausted)


@pytest.mark.parametrize("budget", [-1, 1 << 21, "many"])
def test_a_budget_is_a_number_of_tokens(model, budget):
    with pytest.raises(ConfigError, match="prefill_budget"):
        EngineConfig(prefill_budget=budget)
