"""The Python API: prompts in every form, streams, stop strings, seeds, and an LLM that outlives what goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from models import (
    GEOMETRY,
    FastStart,
    RandomModel,
    model_folder,
    random_token_ids,
    transformers_logits,
    transformers_model,
    with_tokenizer,
)
from small_tokenizers import byte_level, sentencepiece

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import PeerDied, RequestError, TsqpError

GREEDY = SamplingParams(max_tokens=12, temperature=0)
# The demo model's vocabulary, in which most characters outside of ASCII take several tokens.
TEXT_MODEL = RandomModel("llama", {"vocab_size": 49152})
PROMPTS = ["The capital of France", "One, two, three", "Grüße aus Köln 🙂"]


@pytest.fixture(scope="module")
def text_model(demo_model: Path) -> Path:
    return with_tokenizer(model_folder(TEXT_MODEL), demo_model)


@pytest.fixture(scope="module")
def shared_llm(fast: FastStart, text_model: Path) -> Iterator[LLM]:
    with fast.llm(text_model, dtype="float32", max_model_len=128, max_num_seqs=4) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The module's LLM; whatever a test did to it, it still works afterwards."""
    yield shared_llm
    assert len(shared_llm.generate([3, 4, 5], GREEDY)[0].outputs[0].token_ids) == 12


@pytest.fixture(scope="module")
def small_model() -> Path:
    return model_folder(RandomModel("llama"))


def only(outputs):
    (output,) = outputs
    (completion,) = output.outputs
    return completion


def texts(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_a_string_a_list_of_strings_token_ids_and_a_mixture_give_the_same(llm):
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = tokens(llm.generate(PROMPTS, GREEDY))
    assert len(expected) == 3
    assert [tokens(llm.generate(prompt, GREEDY))[0] for prompt in PROMPTS] == expected
    assert [tokens(llm.generate(prompt, GREEDY))[0] for prompt in ids] == expected
    assert tokens(llm.generate(ids, GREEDY)) == expected
    assert tokens(llm.generate([np.array(prompt) for prompt in ids], GREEDY)) == expected
    assert tokens(llm.generate([PROMPTS[0], ids[1], tuple(ids[2])], GREEDY)) == expected
    assert llm.generate([], GREEDY) == []


def test_prompts_of_every_form_give_the_same(llm):
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = tokens(llm.generate(PROMPTS, GREEDY))
    first, second, third = ids
    mixed = [{"prompt": PROMPTS[0]}, torch.tensor(second), {"prompt_token_ids": np.array(third, np.uint16)}]
    assert tokens(llm.generate(mixed, GREEDY)) == expected
    assert tokens(llm.generate(iter(PROMPTS), sampling_params=GREEDY)) == expected
    assert tokens(llm.generate(np.array(PROMPTS), GREEDY, use_tqdm=False)) == expected
    assert tokens(llm.generate(prompt_token_ids=ids, sampling_params=GREEDY)) == expected
    for form in (torch.tensor(first), tuple(first), {"prompt": "other", "prompt_token_ids": first}, iter(first)):
        assert tokens(llm.generate(form, GREEDY)) == expected[:1]
    for form in (np.array(first), {"prompt": PROMPTS[0]}, PROMPTS[0]):
        assert "".join(llm.stream(form, GREEDY)) == only(llm.generate(first, GREEDY)).text
        assert np.array_equal(llm.logits(form), llm.logits(first))


def test_each_prompt_may_have_params_of_its_own(llm):
    params = [
        SamplingParams(max_tokens=3, temperature=0),
        SamplingParams(max_tokens=None, deadline_s=1e-9, temperature=0),
        GREEDY,
    ]
    outputs = llm.generate(PROMPTS, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 0, 12]
    with pytest.raises(RequestError, match="one for each of the 3 prompts"):
        llm.generate(PROMPTS, params[:2])
    with pytest.raises(RequestError, match="sampling_params: got a list of 2"):
        llm.start(PROMPTS[0], params[:2])


def test_max_tokens_none_is_until_the_context_is_full(llm):
    completion = only(llm.generate([5] * 120, SamplingParams(max_tokens=None, ignore_eos=True, temperature=0)))
    assert (len(completion.token_ids), completion.finish_reason) == (8, "length")


class Bar:
    """What vLLM calls of tqdm."""

    def __init__(self, **said: object) -> None:
        self.said, self.count, self.is_closed = said, 0, False

    def update(self, count: int) -> None:
        self.count += count

    def close(self) -> None:
        self.is_closed = True


def test_a_bar_of_the_caller_is_told_of_each_prompt_and_closed(llm):
    bars = []

    def make(**said):
        bars.append(Bar(**said))
        return bars[-1]

    llm.generate(PROMPTS, GREEDY, use_tqdm=make)
    (bar,) = bars
    assert (bar.said["total"], bar.count, bar.is_closed) == (3, 3, True)

    def break_down(count):
        raise ZeroDivisionError

    def make_broken(**said):
        bars.append(Bar(**said))
        bars[-1].update = break_down
        return bars[-1]

    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPTS, GREEDY, use_tqdm=make_broken)
    assert bars[-1].is_closed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"params": GREEDY}, "params: got a SamplingParams, expected sampling_params, as it is called here"),
        ({"lora_request": None}, "lora_request: got None"),
        ({"max_tokens": 3}, r"max_tokens: got 3, expected SamplingParams\(max_tokens=...\)"),
        ({"use_tqdm": "yes"}, r"use_tqdm: got 'yes' \(str\)"),
        ({"use_tqdm": None}, "use_tqdm: got None"),
        ({"use_tqdm": lambda **_: 5}, r"use_tqdm: got 5 \(int\), expected what makes a bar"),
        ({"prompt_token_ids": [5]}, "either prompts or prompt_token_ids"),
        ({"prompts": None}, "prompts: got None"),
        ({"prompts": ["a", None]}, r"prompts\[1\]: got None"),
        ({"prompts": ["a", [5, 49152]]}, r"prompts\[1\]: token 1: got 49152"),
        ({"prompts": ["a", []]}, r"prompts\[1\]: got '0 tokens'"),
        ({"prompts": [[5, 6], [[7]]]}, r"prompts\[1\]: token 0: got \[7\] \(list\)"),
        ({"prompts": range(10**30)}, "prompt: got 'more than 127 tokens'"),
        ({"prompts": itertools.repeat(5)}, "prompt: got 'more than 127 tokens'"),
        ({"prompts": [np.array([0.5])]}, r"prompts\[0\]: token 0: got 0.5 \(float\)"),
        ({"prompts": "x" * 10**6}, "at most 127"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_a_wrong_argument_is_one_error_and_nothing_is_run(llm, arguments, said):
    before = llm.statistics.doorbells
    with pytest.raises(RequestError, match=said) as caught:
        llm.generate(**{"prompts": "a", **arguments})
    assert "\n" not in str(caught.value)
    assert llm.statistics.doorbells == before


@pytest.mark.parametrize("prompt", [None, 5, b"ab", ["a"], [], {"x": 1}, [[5]], [True], {5}], ids=repr)
def test_one_prompt_is_asked_for_where_there_is_place_for_one(llm, prompt):
    for use in (llm.stream, llm.start, llm.logits):
        with pytest.raises(RequestError, match="prompt"):
            use(prompt)


def test_text_may_hold_anything_that_utf_8_can(llm):
    for prompt in ("\0", "a\0b", "\U0010ffff", "<|im_end|>", "\r\n"):
        assert only(llm.generate(prompt, GREEDY)).token_ids


def test_an_output_holds_the_prompt_and_its_completion(llm):
    by_text, by_ids = llm.generate([PROMPTS[0], [5, 6]], GREEDY)
    assert (by_text.prompt, by_text.prompt_token_ids) == (PROMPTS[0], llm.tokenizer.encode(PROMPTS[0]))
    assert (by_ids.prompt, by_ids.prompt_token_ids) == (None, [5, 6])
    completion = by_text.outputs[0]
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert (completion.index, completion.finish_reason, completion.stop_reason, by_text.finished) == (
        0, "length", None, True,
    )  # fmt: skip
    assert by_text.prefill_s > 0
    assert by_text.decode_s > 0


def test_the_default_is_greedy_and_64_tokens(llm):
    completion = only(llm.generate([7, 8, 9]))
    assert (len(completion.token_ids), completion.finish_reason) == (64, "length")


def test_logits_are_those_of_transformers(llm, text_model):
    ids = random_token_ids(100, 49152)
    truth = transformers_logits(text_model, ids)
    ours = llm.logits(ids)
    assert ours.shape == (100, 49152)
    assert np.abs(ours - truth).max() < 1e-4 * truth.std()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_pieces_of_a_stream_add_up_to_the_text(llm, prompt):
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=4, ignore_eos=True)
    pieces = list(llm.stream(prompt, params))
    completion = only(llm.generate(prompt, params))
    assert "".join(pieces) == completion.text == llm.tokenizer.decode(completion.token_ids)
    assert all(pieces)


def test_a_piece_never_splits_a_character(llm):
    """The tokens of a text full of long characters, one by one."""
    text = "a🙂é漢字🏳️‍🌈ø"
    wanted = llm.tokenizer.encode(text, add_special_tokens=False)
    assert len(wanted) > len(text)
    completion = llm.start([1], SamplingParams(max_tokens=len(wanted), temperature=0))
    shown = []
    for token in wanted:
        completion.grow(token)
        shown.append(completion.text)
    assert shown[-1] == text
    for earlier, later in itertools.pairwise(shown):
        assert later.startswith(earlier)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)


def test_a_stream_shows_text_before_the_answer_has_ended(fast, text_model):
    with fast.llm(text_model, max_model_len=512) as llm:
        completion = llm.start(PROMPTS[0], SamplingParams(max_tokens=500, ignore_eos=True, temperature=0))
        stream = llm.stream_completion(completion)
        assert next(stream)
        assert completion.finish_reason is None
        stream.close()


def test_streams_take_turns_and_give_what_each_gives_alone(llm):
    params = SamplingParams(max_tokens=25, temperature=0)
    alone = texts(llm.generate(PROMPTS, params))
    streams = [llm.stream(prompt, params) for prompt in PROMPTS]
    together = ["" for _ in streams]
    going = list(range(len(streams)))
    while going:
        for index in list(going):
            piece = next(streams[index], None)
            if piece is None:
                going.remove(index)
            else:
                together[index] += piece
    assert together == alone


def test_a_closed_stream_frees_its_place_and_the_others_go_on(fast, text_model):
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0)
    with fast.llm(text_model, max_model_len=64, max_num_seqs=1) as llm:
        expected = texts(llm.generate(PROMPTS[1], params))
        for _ in range(3):
            first = llm.stream(PROMPTS[0], params)
            next(first)
            waiting = llm.stream(PROMPTS[1], params)
            first.close()
            assert "".join(waiting) == expected[0]
        abandoned = llm.stream(PROMPTS[0], params)
        next(abandoned)
        del abandoned
        assert texts(llm.generate(PROMPTS[1], params)) == expected


def test_a_stream_that_waits_for_a_place_gets_it(fast, text_model):
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0)
    with fast.llm(text_model, max_model_len=64, max_num_seqs=1) as llm:
        expected = texts(llm.generate(PROMPTS[:2], params))
        first, second = (llm.stream(prompt, params) for prompt in PROMPTS[:2])
        beginning = next(first)
        # One place only, so this runs the first to its end.
        assert "".join(second) == expected[1]
        assert beginning + "".join(first) == expected[0]


def test_a_deadline_before_the_first_step_leaves_nothing_and_the_others_go_on(llm):
    alone = texts(llm.generate(PROMPTS[1], GREEDY))
    late = llm.stream(PROMPTS[0], SamplingParams(deadline_s=1e-9, temperature=0, max_tokens=64))
    assert list(late) == []
    before = llm.statistics.doorbells
    assert (
        only(llm.generate(PROMPTS[0], SamplingParams(deadline_s=1e-9, temperature=0, max_tokens=64))).finish_reason
        == "deadline"
    )
    assert llm.statistics.doorbells == before
    assert texts(llm.generate(PROMPTS[1], SamplingParams(max_tokens=12, deadline_s=1000, temperature=0))) == alone


def test_a_wrong_prompt_is_refused_when_the_stream_is_asked_for(llm):
    with pytest.raises(RequestError):
        llm.stream([llm.spec.vocab_size])


def test_an_end_of_sequence_token_finishes_by_stop(fast, text_model, tmp_path):
    (answer,) = tokens(fast_answers(fast, text_model, [[1, 2, 3]], 10))
    eos = answer[4]
    folder = copy_with_eos(text_model, tmp_path / "one", eos)
    (stopped,) = fast_answers(fast, folder, [[1, 2, 3]], 10)
    expected = answer[: answer.index(eos) + 1]
    assert tokens([stopped]) == [expected]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].text == with_tokenizer_of(text_model).decode(expected[:-1])
    (ignored,) = fast_answers(fast, folder, [[1, 2, 3]], 10, ignore_eos=True)
    assert tokens([ignored]) == [answer]
    assert ignored.outputs[0].finish_reason == "length"


def fast_answers(fast, folder, prompts, max_tokens, **params):
    with fast.llm(folder, dtype="float32", max_model_len=64) as llm:
        return llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0, **params))


def with_tokenizer_of(folder: Path):
    from tsqp_shm.model.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder)


def copy_with_eos(folder: Path, target: Path, eos: int) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    (target / "generation_config.json").unlink(missing_ok=True)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, eos]}))
    return target


def test_a_stop_string_cuts_text_and_stream_alike(llm):
    params = {"max_tokens": 40, "ignore_eos": True, "temperature": 0}
    whole = only(llm.generate(PROMPTS[0], SamplingParams(**params))).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 5]
    cut = whole[: whole.index(stop)]
    completion = only(llm.generate(PROMPTS[0], SamplingParams(stop=stop, **params)))
    assert (completion.text, completion.finish_reason) == (cut, "stop")
    assert len(completion.token_ids) < 40
    shown = ""
    for piece in llm.stream(PROMPTS[0], SamplingParams(stop=["never there", stop], **params)):
        shown += piece
        assert cut.startswith(shown)
    assert shown == cut


def test_an_output_is_a_value_that_can_be_read_and_pickled(llm):
    outputs = llm.generate([{"prompt": "both", "prompt_token_ids": np.array([5, 6])}], GREEDY)
    assert (outputs[0].prompt, outputs[0].prompt_token_ids) == ("both", [5, 6])
    assert pickle.loads(pickle.dumps(outputs)) == outputs
    said = (
        r"RequestOutput\(request_id='\d+', prompt='both', prompt_token_ids=\[5, 6\], prompt_logprobs=None, outputs=\[C"
    )
    assert re.match(said, repr(outputs[0]))


# So many special tokens that a random model says some.
SPECIALS = [f"<|{number}|>" for number in range(44)]


def model_of(tokenizer, tmp_path: Path) -> Path:
    folder = RandomModel("llama", {"vocab_size": tokenizer.get_vocab_size()}).write(tmp_path)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_stop_strings_with_special_tokens_end_where_they_do_in_transformers(fast, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level(specials=SPECIALS)
    folder = model_of(tokenizer, tmp_path)
    prompt = [3, 4, 5]
    with fast.llm(folder, dtype="float32", max_model_len=64) as llm:
        answer = only(llm.generate(prompt, SamplingParams(max_tokens=40, temperature=0))).token_ids
        special = next(place for place, token_id in enumerate(answer) if place and token_id >= 256)
        spelled = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in answer]
        for stop in (spelled[special], "|>", spelled[special][:3]):
            completion = only(llm.generate(prompt, SamplingParams(max_tokens=40, stop=stop, temperature=0)))
            theirs = transformers_model(folder, torch.float32, "eager").generate(
                torch.tensor([prompt]),
                max_new_tokens=40,
                do_sample=False,
                stop_strings=[stop],
                tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer),
            )
            assert completion.token_ids == theirs[0, 3:].tolist()
            assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
            assert "<" not in completion.text


def test_prompt_and_text_are_the_decoding_of_all_tokens(fast, tmp_path):
    tokenizer = sentencepiece()
    with fast.llm(model_of(tokenizer, tmp_path), dtype="float32", max_model_len=64) as llm:
        for prompt in ("x", "!x x", [260, 261], [1, 263]):
            (output,) = llm.generate(prompt, SamplingParams(max_tokens=30, temperature=0))
            completion = output.outputs[0]
            before = tokenizer.decode(output.prompt_token_ids)
            assert before + completion.text == tokenizer.decode(output.prompt_token_ids + completion.token_ids)
            pieces = list(llm.stream(prompt, SamplingParams(max_tokens=30, temperature=0)))
            assert "".join(pieces) == completion.text


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_chat_answers_one_conversation_or_several(llm):
    text = llm.tokenizer.apply_chat_template(CONVERSATION)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    expected = tokens(llm.generate(ids, GREEDY))
    (output,) = llm.chat(CONVERSATION, GREEDY)
    assert (output.prompt, output.prompt_token_ids, output.outputs[0].token_ids) == (text, ids, expected[0])
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, CONVERSATION[1]]
    outputs = llm.chat(
        [CONVERSATION, parts], sampling_params=[GREEDY, SamplingParams(max_tokens=3, temperature=0)], use_tqdm=False
    )
    assert tokens(outputs) == [expected[0], expected[0][:3]]
    assert llm.chat([]) == []
    assert llm.chat_prompt(CONVERSATION) == ids


def test_chat_refuses_what_is_no_conversation(llm):
    before = llm.statistics.doorbells
    for messages, said in (
        ("Hello", "messages: got 'Hello'"),
        ([CONVERSATION, [{"role": "user"}]], r"messages\[1\]\[0\]"),
    ):
        with pytest.raises(RequestError, match=said):
            llm.chat(messages)
    with pytest.raises(RequestError, match="tools: got"):
        llm.chat(CONVERSATION, tools=[{}])
    assert llm.statistics.doorbells == before


def test_a_seed_repeats_in_any_company(llm):
    params = SamplingParams(max_tokens=15, temperature=1.0, top_k=5, seed=9)
    alone = tokens(llm.generate(PROMPTS[0], params))
    assert tokens(llm.generate(PROMPTS[0], params)) == alone
    assert tokens(llm.generate(PROMPTS, params))[:1] == alone
    assert tokens(llm.generate(PROMPTS[0], SamplingParams(max_tokens=15, temperature=1.0, top_k=5, seed=10))) != alone


def test_top_k_one_is_greedy(llm):
    greedy = tokens(llm.generate(PROMPTS, GREEDY))
    params = SamplingParams(max_tokens=12, temperature=1.7, top_k=1)
    assert tokens(llm.generate(PROMPTS, params)) == greedy


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "at least one token"),
        ([[]], "at least one token"),
        ([1] * 128, "at most 127"),
        ([49152], "0 to 49151"),
        ([-1], "0 to 49151"),
        ([1.0], "0 to 49151"),
        ([True], "0 to 49151"),
        ([2**70], "0 to 49151"),
        (["fine", [1, 49152]], "0 to 49151"),
        ("\ud800", "UTF-8"),
    ],
    ids=repr,
)
def test_a_wrong_prompt_is_refused_and_nothing_is_run(llm, prompt, said):
    before = llm.statistics.doorbells
    with pytest.raises(RequestError, match=said):
        llm.generate(prompt)
    assert llm.statistics.doorbells == before


def test_logits_refuse_a_wrong_prompt(llm):
    for token_ids in ([], [49152], [1] * 129):
        with pytest.raises(RequestError):
            llm.logits(token_ids)
    assert llm.logits([1] * 128).shape == (128, 49152)


def test_logits_leave_a_completion_in_progress_as_it_was(fast, text_model):
    """They take a cache of their own, and where all are taken they wait for one."""
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0)
    for max_num_seqs in (1, 2):
        with fast.llm(text_model, dtype="float32", max_model_len=64, max_num_seqs=max_num_seqs) as llm:
            expected, logits = only(llm.generate(PROMPTS[0], params)).text, llm.logits([1, 2, 3])
            stream = llm.stream(PROMPTS[0], params)
            shown = next(stream)
            assert np.array_equal(llm.logits([1, 2, 3]), logits)
            assert shown + "".join(stream) == expected


def test_stop_strings_and_text_need_a_tokenizer(fast, small_model):
    with fast.llm(small_model, max_model_len=32) as llm:
        with pytest.raises(RequestError, match="tokenizer"):
            llm.generate([1], SamplingParams(stop="x", temperature=0, max_tokens=64))
        with pytest.raises(TsqpError, match=r"tokenizer\.json"):
            llm.generate("text")
        assert only(llm.generate([1], GREEDY)).text == ""


def test_stats_have_everything_the_command_prints(llm):
    llm.generate(PROMPTS, GREEDY)
    stats = json.loads(json.dumps(llm.stats()))
    assert stats["mode"] == "plain"
    assert stats["processes"]["tee"]["pid"] == os.getpid() != stats["processes"]["gpu"]["pid"]
    assert stats["processes"]["tee"]["peak_rss_bytes"] > stats["arena"]["bytes"] > 0
    assert stats["processes"]["gpu"]["peak_rss_bytes"] > stats["arena"]["bytes"]
    assert stats["bytes"]["serialised"] == 0
    assert stats["bytes"]["to_gpu"] > 0
    assert stats["bytes"]["to_tee"] > 0
    assert stats["doorbell"]["rung"] >= sum(row["calls"] for row in stats["operations"] if row["side"] == "gpu") - 1
    assert 0 < stats["doorbell"]["round_trip_p50_us"] <= stats["doorbell"]["round_trip_p99_us"]
    names = {side: {row["operation"] for row in stats["operations"] if row["side"] == side} for side in ("gpu", "tee")}
    assert names["gpu"] >= {"EMBED", "QKV", "SCORES", "CONTEXT", "GATE_UP", "DOWN", "LM_HEAD"}
    assert names["tee"] >= {"RMSNORM", "ROPE", "SOFTMAX", "SILU", "SAMPLE"}
    for side in ("gpu", "tee"):
        assert sum(row["share"] for row in stats["operations"] if row["side"] == side) == pytest.approx(1)


def test_bytes_in_slots_are_counted_as_the_shapes_say(fast, small_model):
    rows, columns, dtype_bytes = 10, 64, 2
    with fast.llm(small_model, max_model_len=32, float32_rows=0) as llm:
        llm.generate([1] * rows, SamplingParams(max_tokens=1, temperature=0))
        moved = llm.stats()["bytes"]
    hidden, feed_forward, vocab = (GEOMETRY[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    qk = (GEOMETRY["num_attention_heads"] + GEOMETRY["num_key_value_heads"]) * GEOMETRY["head_dim"]
    scores = GEOMETRY["num_attention_heads"] * rows * columns * dtype_bytes
    to_gpu = rows * (2 * hidden + qk + feed_forward) * dtype_bytes + scores
    to_tee = rows * (2 * hidden + qk + 2 * feed_forward) * dtype_bytes + scores
    layers = GEOMETRY["num_hidden_layers"]
    assert moved["to_gpu"] == rows * 4 + layers * to_gpu + hidden * dtype_bytes
    assert moved["to_tee"] == rows * hidden * dtype_bytes + layers * to_tee + vocab * 4


def test_two_llms_in_one_process_do_not_meet(fast, text_model, small_model):
    with fast.llm(small_model, max_model_len=64, dtype="float32") as first:
        expected = tokens(first.generate([1, 2, 3], GREEDY))
        with fast.llm(text_model, max_model_len=64) as second:
            stream = second.stream(PROMPTS[0], SamplingParams(max_tokens=10, ignore_eos=True, temperature=0))
            next(stream)
            assert tokens(first.generate([1, 2, 3], GREEDY)) == expected
            assert list(stream)
        assert tokens(first.generate([1, 2, 3], GREEDY)) == expected


def test_a_closed_llm_says_so(fast, small_model):
    llm = fast.llm(small_model, max_model_len=64)
    stream = llm.stream([1, 2], GREEDY)
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate([1]),
        lambda: llm.logits([1]),
        lambda: next(stream),
        lambda: llm.start([1]),
    ):
        with pytest.raises(TsqpError, match="closed"):
            use()
    assert llm.stats()["doorbell"]["rung"] > 0


def test_ctrl_c_ends_the_wait_for_a_peer_that_hangs(fast, small_model):
    with fast.llm(small_model, max_model_len=64, dtype="float32") as llm:
        expected = tokens(llm.generate([1, 2, 3], GREEDY))
        gpu = llm.stats()["processes"]["gpu"]["pid"]
        stream = llm.stream([1, 2, 3])
        os.kill(gpu, signal.SIGSTOP)
        continued = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        continued.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                llm.generate([1, 2, 3], GREEDY)
        finally:
            os.kill(gpu, signal.SIGCONT)
            continued.join()
        stream.close()
        assert tokens(llm.generate([1, 2, 3], GREEDY)) == expected


def test_a_killed_gpu_process_is_named_and_the_llm_stays_broken(fast, small_model):
    with fast.llm(small_model, max_model_len=64) as llm:
        stream = llm.stream([1, 2])
        os.kill(llm.stats()["processes"]["gpu"]["pid"], signal.SIGKILL)
        with pytest.raises(PeerDied, match="gpu") as caught:
            llm.generate([1], SamplingParams(max_tokens=50, temperature=0))
        for use in (lambda: llm.generate([1]), lambda: llm.logits([1]), lambda: next(stream)):
            with pytest.raises(PeerDied) as again:
                use()
            assert (type(again.value), str(again.value)) == (PeerDied, str(caught.value))
        assert llm.stats()["processes"]["gpu"]["peak_rss_bytes"] == 0


@pytest.mark.slow
def test_its_own_gpu_process_is_started_stopped_and_quoted(small_model):
    with LLM(small_model, max_model_len=64) as llm:
        gpu = llm.stats()["processes"]["gpu"]["pid"]
        assert Path(f"/proc/{gpu}").exists()
        assert b"\0gpu\0" in Path(f"/proc/{gpu}/cmdline").read_bytes()
        assert len(only(llm.generate([1], GREEDY)).token_ids) == 12
    assert not Path(f"/proc/{gpu}").exists()
    with LLM(small_model, max_model_len=64) as llm:
        os.kill(llm.stats()["processes"]["gpu"]["pid"], signal.SIGKILL)
        with pytest.raises(PeerDied, match="SIGKILL"):
            llm.generate([1], SamplingParams(max_tokens=50, temperature=0))


@pytest.mark.slow
def test_peak_memory_is_the_process_s_own_and_not_its_parent_s():
    """What getrusage says survives exec."""
    script = """
import subprocess, sys
ballast = b"x" * (1 << 30)
child = "from tsqp_shm.roles.process import peak_resident_bytes; print(peak_resident_bytes())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < int(result.stdout) < 1 << 29


@pytest.mark.slow
def test_the_process_of_the_llm_loads_neither_torch_nor_transformers(demo_model):
    script = """
import json, sys
from tsqp_shm import LLM, SamplingParams
with LLM(sys.argv[1], max_model_len=128) as llm:
    llm.generate("The capital of France", SamplingParams(max_tokens=4, temperature=1.0, stop="x"))
    text = llm.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    print("".join(llm.stream(text, SamplingParams(max_tokens=4, temperature=0))), file=sys.stderr)
    maps = open("/proc/self/maps").read()
    gpu_maps = open(f"/proc/{llm.stats()['processes']['gpu']['pid']}/maps").read()
    print(json.dumps({
        "modules": sorted(sys.modules),
        "tee_libraries": sorted({line.split()[-1] for line in maps.splitlines() if "/" in line}),
        "gpu_has_torch": "libtorch" in gpu_maps,
        "gpu_has_products": "/_products." in gpu_maps,
        "stats": llm.stats(),
    }))
"""
    result = subprocess.run([sys.executable, "-c", script, str(demo_model)], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    loaded = {name.partition(".")[0] for name in found["modules"]}
    assert loaded >= {"numpy", "zmq", "tokenizers", "tsqp_shm"}
    assert not loaded & {"torch", "transformers", "gguf", "huggingface_hub"}
    assert not [name for name in found["modules"] if name.startswith(("tsqp_shm.gpu", "tsqp_shm.bench"))]
    foreign = ("torch", "libgomp", "libcu", "_products", "_round_trips")
    assert not [path for path in found["tee_libraries"] if any(part in path for part in foreign)]
    assert found["gpu_has_torch"]
    assert found["gpu_has_products"]
    peak = {role: facts["peak_rss_bytes"] for role, facts in found["stats"]["processes"].items()}
    assert 0 < peak["tee"] < peak["gpu"]
