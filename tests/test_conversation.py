"""A conversation's cache is kept between its turns: the tokens are those of one that is computed anew."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
from models import FastStart, RandomModel, with_bytes_as_tokens

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.conversation import Conversation
from tsqp_shm.errors import ConfigError, RequestError, TsqpError
from tsqp_shm.outputs import RequestOutput
from tsqp_shm.tee.updates import Update

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
# What such bytes spell is turned into the same tokens again.
LETTERS = tuple(range(66, 92))
PARAMS = SamplingParams(max_tokens=9, temperature=1.0, seed=3, allowed_token_ids=LETTERS)
QUESTIONS = ["what is it?", "and the other one, which is asked for at greater length than the first?", "why?"]
MODES = {
    "plain": {"mode": "plain", "dtype": "float32"},
    "verified": {"mode": "verified"},
    "blinded": {"mode": "blinded", "prefix_reuse": True, "pad_stock": 64},
    "blinded, rounded": {"mode": "blinded", "prefix_reuse": True, "pad_stock": 64, "pad_prompt_to": 16},
    "tee-only": {"mode": "tee-only"},
}


def written(folder: Path, family: str = "llama", **fields: object) -> Path:
    fields = {"vocab_size": 256, **fields}
    with_bytes_as_tokens(RandomModel(family, fields).write(folder))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("conversation") / "model")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("conversation") / "windowed", "mistral", sliding_window=16)


@contextmanager
def begun(fast: FastStart, model: Path, mode: str = "tee-only", **settings: object) -> Iterator[LLM]:
    settings = {"max_model_len": 400, **settings}
    with LLM(model, mode=mode, **settings) if mode == "tee-only" else fast.llm(model, mode=mode, **settings) as llm:
        yield llm


class Talk:
    """A conversation and what was said so far; every answer is held against one that is computed anew."""

    def __init__(self, llm: LLM, first: str = "hello") -> None:
        self.llm = llm
        self.conversation: Conversation | None = llm.conversation()
        self.messages = [{"role": "u", "content": first}]
        self.held: list[int] = []

    def turn(self, params: SamplingParams = PARAMS, then: str = "go on") -> RequestOutput:
        assert self.conversation is not None
        said = self.conversation.chat(self.messages, params)
        (anew,) = self.llm.chat(self.messages, params)
        assert (said.prompt, said.prompt_token_ids) == (anew.prompt, anew.prompt_token_ids)
        assert said.outputs == anew.outputs
        assert said.prompt_logprobs == anew.prompt_logprobs
        assert anew.num_cached_tokens == 0
        self.held = [*said.prompt_token_ids, *said.outputs[0].token_ids][:-1]
        self.say(said.outputs[0].text, then)
        return said

    def say(self, answer: str, then: str) -> None:
        self.messages += [{"role": "a", "content": answer}, {"role": "u", "content": then}]


@pytest.mark.parametrize(
    "mode", [*list(MODES)[:3], pytest.param("blinded, rounded", marks=pytest.mark.long), "tee-only"]
)
def test_each_turn_goes_on_from_all_that_the_last_one_has_left(fast, model, mode):
    with begun(fast, model, **MODES[mode]) as llm:
        talk = Talk(llm)
        assert talk.conversation.reuses
        assert talk.turn(then=QUESTIONS[0]).num_cached_tokens == 0
        for question in QUESTIONS[1:]:
            held = len(talk.held)
            assert talk.turn(then=question).num_cached_tokens == held > 0


@pytest.mark.parametrize("mode", ["tee-only", pytest.param("plain", marks=pytest.mark.long)])
def test_with_a_window_too(fast, windowed, mode):
    with begun(fast, windowed, **MODES[mode]) as llm:
        talk = Talk(llm)
        assert [talk.turn().num_cached_tokens > 0 for _ in range(3)] == [False, True, True]


@pytest.fixture(scope="module")
def shared(fast, model) -> Iterator[LLM]:
    with begun(fast, model) as llm:
        yield llm


def test_what_was_said_otherwise_before_is_computed_again_from_there_on(shared):
    talk = Talk(shared)
    talk.turn()
    talk.messages[0] = {"role": "u", "content": "hullo"}
    assert talk.turn().num_cached_tokens == len("<u>h")
    # And of a beginning that was shorter, at least the last token is run.
    del talk.messages[1:]
    assert talk.turn().num_cached_tokens == len("<u>hullo<a>") - 1


@pytest.mark.parametrize(
    "params",
    [
        replace(PARAMS, stop=["G", "H", "I", "J", "K", "L"]),
        replace(PARAMS, stop_token_ids=LETTERS[:16]),
        replace(PARAMS, max_tokens=1),
        replace(PARAMS, allowed_token_ids=None, temperature=2.0),
    ],
    ids=["stop string", "stop token", "one token", "bytes that are no text"],
)
def test_however_an_answer_ends_the_next_turn_goes_on(shared, params):
    talk = Talk(shared)
    talk.turn(params)
    assert talk.turn(params).num_cached_tokens >= len("<u>hello<a>")


def test_an_answer_that_was_cancelled_leaves_what_was_computed(shared):
    talk = Talk(shared)
    pieces = talk.conversation.stream(talk.messages, replace(PARAMS, max_tokens=300))
    shown = "".join(next(pieces) for _ in range(3))
    pieces.close()
    talk.say(shown, "go on")
    assert talk.turn().num_cached_tokens >= len("<u>hello<a>") + 2


def test_a_prompt_that_is_scored_is_computed_whole_and_leaves_its_cache(shared):
    talk = Talk(shared)
    talk.turn()
    assert talk.turn(replace(PARAMS, prompt_logprobs=2)).num_cached_tokens == 0
    assert talk.turn().num_cached_tokens > 0


def test_two_turns_at_once_are_an_error_of_the_second(shared):
    with shared.conversation() as conversation:
        messages = [{"role": "u", "content": "hello"}]
        first, second = (conversation.start(messages, PARAMS) for _ in range(2))
        updates: SimpleQueue[Update] = SimpleQueue()
        shared.runtime.add([first, second], updates.put)
        with pytest.raises(RequestError, match="a turn while one is in progress"):
            while True:
                shared.runtime.next_update(updates)
        while not shared.runtime.next_update(updates).is_last:
            pass
        assert len(first.token_ids) == PARAMS.max_tokens
        # One that was never run is no turn.
        conversation.start(messages, PARAMS)
        assert conversation.chat(messages, PARAMS).num_cached_tokens == len("<u>hello<a>") - 1
    with pytest.raises(RequestError, match="closed"):
        conversation.start(messages, PARAMS)


def test_several_completions_are_refused(shared):
    with shared.conversation() as conversation, pytest.raises(RequestError, match=r"n: .* 1"):
        conversation.chat([{"role": "u", "content": "hello"}], replace(PARAMS, n=2))


def test_threads_have_conversations_of_their_own(shared):
    def converse(number: int) -> list[bool]:
        talk = Talk(shared, f"{number} " * (5 + 7 * number))
        return [talk.turn().num_cached_tokens > 0 for _ in range(3)]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(converse, range(3))) == [[False, True, True]] * 3


@pytest.mark.parametrize(
    "settings",
    [{"mode": "blinded", "pad_stock": 64}, {"mode": "tee-only", "prefix_reuse": False}],
    ids=["blinded by default", "off"],
)
def test_where_it_is_off_every_turn_is_computed_whole(fast, model, settings):
    with begun(fast, model, **settings) as llm:
        talk = Talk(llm)
        assert not talk.conversation.reuses
        assert [talk.turn().num_cached_tokens for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("mode", ["tee-only", pytest.param("plain", marks=pytest.mark.long)])
def test_whoever_waits_is_given_an_idle_conversation_s_cache(fast, model, mode):
    with begun(fast, model, **MODES[mode], max_num_seqs=1) as llm:
        talk = Talk(llm)
        # Each is held against a request that needs the only cache there is.
        assert [talk.turn().num_cached_tokens for _ in range(3)] == [0, 0, 0]
        assert talk.conversation.chat(talk.messages, PARAMS).num_cached_tokens == 0
        assert talk.conversation.chat(talk.messages, PARAMS).num_cached_tokens > 0
        assert llm.logits([1, 2, 3]).shape == (3, 256)
        assert talk.conversation.chat(talk.messages, PARAMS).num_cached_tokens == 0


def test_the_cache_that_was_used_longest_ago_is_given_up_first(fast, model):
    with begun(fast, model, max_num_seqs=2) as llm:
        messages = [{"role": "u", "content": "hello"}]
        older, newer, third = (llm.conversation() for _ in range(3))

        def is_found(conversation: Conversation) -> bool:
            return conversation.chat(messages, PARAMS).num_cached_tokens > 0

        assert not is_found(older)
        assert not is_found(newer)
        assert is_found(older)
        assert not is_found(third)
        assert is_found(older)
        assert not is_found(newer)


@pytest.mark.parametrize("end", ["close", "with", "let go", "in another thread"])
def test_a_conversation_that_ends_gives_its_cache_back(fast, model, end):
    with begun(fast, model, max_num_seqs=2) as llm:
        messages = [{"role": "u", "content": "hello"}]
        kept, ended = llm.conversation(), llm.conversation()
        for conversation in (kept, ended):
            conversation.chat(messages, PARAMS)
        if end == "close":
            ended.close()
            ended.close()
        elif end == "with":
            with ended:
                pass
        elif end == "let go":
            del conversation, ended
            gc.collect()
        else:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(ended.close).result()
        # It finds that one free, and need not take another's.
        llm.chat(messages, PARAMS)
        assert kept.chat(messages, PARAMS).num_cached_tokens > 0


def test_one_that_ends_in_the_middle_of_a_turn_keeps_nothing_and_the_turn_goes_on(fast, model):
    with begun(fast, model, max_num_seqs=2) as llm:
        messages = [{"role": "u", "content": "hello"}]
        kept, ended = llm.conversation(), llm.conversation()
        kept.chat(messages, PARAMS)
        completion = ended.start(messages, replace(PARAMS, max_tokens=200))
        pieces = llm.stream_completion(completion)
        next(pieces)
        ended.close()
        list(pieces)
        assert len(completion.token_ids) == 200
        llm.chat(messages, PARAMS)
        assert kept.chat(messages, PARAMS).num_cached_tokens > 0


@pytest.mark.parametrize(
    ("mode", "keeps"), [("plain", False), ("verified", True), pytest.param("blinded", True, marks=pytest.mark.long)]
)
def test_another_gpu_process_finds_what_the_tee_process_keeps(fast, model, mode, keeps):
    """It takes the place of one that dies in a turn; in `plain` also of one that died between two."""
    with begun(fast, model, **MODES[mode], restart_gpu=2) as llm:
        talk = Talk(llm)
        talk.turn()
        for between in (False, True) if mode == "plain" else (False,):
            held = len(talk.held)
            os.kill(llm.bring_up()["processes"]["gpu"]["pid"], signal.SIGKILL)
            if between:
                llm.generate(["x"], PARAMS)
            assert talk.turn().num_cached_tokens == (held if keeps else 0)
        assert llm.statistics.gpu_restarts == 1 + (mode == "plain")


def test_a_forked_child_has_no_part_in_it(fast, model, forked):
    with begun(fast, model) as llm:
        talk = Talk(llm)
        talk.turn()

        def child() -> None:
            with pytest.raises(TsqpError, match="a forked child"):
                talk.conversation.chat(talk.messages, PARAMS)
            talk.conversation.close()

        forked(child).join()
        assert talk.turn().num_cached_tokens > 0


def test_a_conversation_outlives_its_session_in_one_clear_error(fast, model):
    with begun(fast, model) as llm:
        conversation = llm.conversation()
        conversation.chat([{"role": "u", "content": "hello"}], PARAMS)
    with pytest.raises(TsqpError, match="this LLM is closed"):
        conversation.chat([{"role": "u", "content": "hello"}], PARAMS)
    conversation.close()


def test_settings_are_true_or_false(model):
    with pytest.raises(ConfigError, match="prefix_reuse"):
        LLM(model, mode="tee-only", prefix_reuse="maybe")
