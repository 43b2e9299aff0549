"""What `SamplingParams` ask for, end to end: tokens as transformers' processors have them, log probabilities, seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from models import (
    FastStart,
    RandomModel,
    model_folder,
    random_token_ids,
    transformers_logits,
    transformers_model,
)
from small_tokenizers import byte_level

from tsqp_shm import LLM, Logprob, SamplingParams
from tsqp_shm.errors import ModelFileError, NumericsError, ProtocolError, RequestError, UnsupportedModel
from tsqp_shm.model.generation_config import sampling_fields
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.harvest import Harvest
from tsqp_shm.tee.sampling_params import UNASKED
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.verification import Unverified, Verification

VOCAB = 262
# Shorter and longer than a step, and of more rows than a slot of logits has.
PROMPTS = [list(random_token_ids(length, seed=length)) for length in (1, 7, 45)]
LIMITS = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 4, "max_batch_tokens": 16}
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> Path:
    folder = model_folder(RandomModel("llama", {"vocab_size": VOCAB}))
    backend = byte_level(["ca", "cat", "Ġcat"])
    vocabulary = backend.get_vocab(with_added_tokens=False)
    backend.model = tokenizers.models.BPE(vocabulary, [("c", "a"), ("ca", "t"), ("Ġ", "cat")])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llm(fast: FastStart, model: Path) -> Iterator[LLM]:
    with fast.llm(model, **LIMITS) as llm:
        yield llm


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def generated_by_transformers(model: Path, prompt: list[int], **options) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        sequences = transformers_model(model, torch.float32, "eager").generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    completion: list[int] = sequences[0, len(prompt) :].tolist()
    return completion


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()


def assert_scores(found: dict[int, Logprob], expected: np.ndarray, token_id: int, top: int) -> None:
    """One position's log probabilities against those of transformers."""
    likeliest = np.argsort(-expected, kind="stable")[:top].tolist()
    assert next(iter(found)) == token_id
    assert set(found) == {token_id, *likeliest}
    for token, one in found.items():
        assert one.logprob == pytest.approx(expected[token], abs=1e-3)
        assert one.rank == np.sum(expected >= expected[token])


@pytest.mark.parametrize("top", [0, 3, -1])
def test_log_probabilities_are_those_of_transformers(llm, model, top):
    count = VOCAB if top == -1 else top
    params = SamplingParams(**GREEDY, logprobs=top, prompt_logprobs=top, repetition_penalty=1.2)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        (completion,) = output.outputs
        expected = log_softmax(transformers_logits(model, (*prompt, *completion.token_ids)))
        assert output.prompt_logprobs is not None
        assert completion.logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        assert len(completion.logprobs) == len(completion.token_ids)
        every = [*output.prompt_logprobs[1:], *completion.logprobs]
        asked = [*prompt[1:], *completion.token_ids]
        for position, (found, token_id) in enumerate(zip(every, asked, strict=True)):
            assert_scores(found, expected[position], token_id, count)
        chosen = [found[token] for found, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(one.logprob for one in chosen))
        spelled = [llm.tokenizer.decode([token], skip_special_tokens=False) for token in completion.token_ids]
        assert [one.decoded_token for one in chosen] == spelled


def test_log_probabilities_are_given_to_who_has_asked_alone(llm):
    params = [
        SamplingParams(**GREEDY),
        SamplingParams(**GREEDY, logprobs=2, detokenize=False),
        SamplingParams(**GREEDY, prompt_logprobs=1),
    ]
    alone = [llm.generate(prompt, each)[0] for prompt, each in zip(PROMPTS, params, strict=True)]
    together = llm.generate(PROMPTS, params)
    assert tokens(together) == tokens(alone)
    first, second, third = together
    assert (first.prompt_logprobs, first.outputs[0].logprobs, first.outputs[0].cumulative_logprob) == (None, None, None)
    assert second.outputs[0].text == ""
    assert {one.decoded_token for found in second.outputs[0].logprobs for one in found.values()} == {None}
    assert (third.outputs[0].logprobs, len(third.prompt_logprobs)) == (None, 45)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
        (
            {"logit_bias": {40: 9.0, 41: -100.0}, "repetition_penalty": 1.3},
            {"sequence_bias": [[[40], 9.0], [[41], -100.0]], "repetition_penalty": 1.3},
        ),
    ],
)
def test_tokens_are_those_of_transformers_processors(llm, model, ours, theirs):
    completed = llm.generate(PROMPTS, SamplingParams(**{**GREEDY, "max_tokens": 16}, **ours))
    for prompt, completion in zip(PROMPTS, tokens(completed), strict=True):
        assert completion == generated_by_transformers(model, prompt, **theirs)


@pytest.mark.parametrize("min_tokens", [0, 1, 5, 16])
def test_min_tokens_keeps_a_stop_token_from_being_drawn_as_in_transformers(llm, model, min_tokens):
    prompt = PROMPTS[1]
    likeliest = {**GREEDY, "max_tokens": 16}
    (stop, *_) = tokens(llm.generate(prompt, SamplingParams(**likeliest)))[0]
    params = SamplingParams(**likeliest, stop_token_ids=[stop], min_tokens=min_tokens)
    (completion,) = llm.generate(prompt, params)[0].outputs
    expected = generated_by_transformers(model, prompt, eos_token_id=stop, min_new_tokens=min_tokens)
    assert completion.token_ids == expected
    assert stop not in completion.token_ids[:min_tokens]
    assert completion.stop_reason == (stop if expected[-1] == stop else None)


def test_presence_and_frequency_penalties_count_the_answer_alone(llm):
    prompt = PROMPTS[1]
    params = SamplingParams(**{**GREEDY, "max_tokens": 24}, presence_penalty=0.3, frequency_penalty=0.5)
    (completion,) = tokens(llm.generate(prompt, params))
    logits = llm.logits(prompt + completion)[len(prompt) - 1 : -1]
    for position, token_id in enumerate(completion):
        counts = np.bincount(completion[:position], minlength=VOCAB)
        assert token_id == np.argmax(logits[position] - 0.5 * counts - 0.3 * (counts > 0))
    assert completion != tokens(llm.generate(prompt, SamplingParams(**{**GREEDY, "max_tokens": 24})))[0]


def test_nothing_but_allowed_tokens_is_drawn(llm):
    params = SamplingParams(n=4, max_tokens=20, seed=1, temperature=5.0, allowed_token_ids=[7, 9, 3], ignore_eos=True)
    drawn = [token for output in llm.generate(PROMPTS[1], params)[0].outputs for token in output.token_ids]
    assert set(drawn) == {3, 7, 9}


def test_bad_words_are_forbidden_at_the_beginning_and_behind_a_space(llm):
    """As vLLM tokenises them."""
    (alone,), (behind,), other = llm.tokenizer.encode("cat"), llm.tokenizer.encode(" cat"), 5
    allowed = {"allowed_token_ids": [alone, behind, other], "max_tokens": 30, "seed": 3, "ignore_eos": True}
    (free,) = tokens(llm.generate(PROMPTS[0], SamplingParams(**allowed, temperature=9.0)))
    (bound,) = tokens(llm.generate(PROMPTS[0], SamplingParams(**allowed, temperature=9.0, bad_words=[" cat"])))
    assert set(free) == {alone, behind, other}
    assert set(bound) == {other}


def test_a_bad_word_of_several_tokens_is_forbidden_at_its_end_alone(llm):
    a, b = llm.tokenizer.encode("ab")
    allowed = {"allowed_token_ids": [a, b], "max_tokens": 60, "seed": 3, "ignore_eos": True, "temperature": 9.0}
    (drawn,) = llm.generate(PROMPTS[0], SamplingParams(**allowed, bad_words=["ab"]))[0].outputs
    assert "ab" not in drawn.text
    assert {"a", "b"} == set(drawn.text)
    assert "bb" in drawn.text


def test_rules_that_leave_no_token_end_their_completion_alone(fast, model):
    """Nothing else of the step is lost, and the session goes on."""
    with fast.runtime(model, **LIMITS) as runtime:

        def completion(**params) -> Completion:
            return Completion(PROMPTS[1], SamplingParams(**GREEDY, **params), 8, (), None, vocab_size=VOCAB)

        alone = completion()
        runtime.add([alone], lambda update: None)
        while runtime.step():
            pass
        kept, lost = completion(), completion(allowed_token_ids=[5], stop_token_ids=[5], min_tokens=2)
        updates = []
        runtime.add([kept], lambda update: None)
        runtime.add([lost], updates.append)
        while runtime.step():
            pass
        assert kept.token_ids == alone.token_ids
        (update,) = updates
        assert (update.finish_reason, update.is_last, lost.token_ids) == ("error", True, [])
        assert isinstance(update.error, RequestError)
        assert "leave none as token 0" in str(update.error)
        assert runtime.load().free_sequences == 4


def test_rules_that_leave_no_token_are_a_request_error(llm):
    impossible = SamplingParams(allowed_token_ids=[5], stop_token_ids=[5], min_tokens=2)
    with pytest.raises(RequestError, match="rules that leave none as token 0"):
        llm.generate([PROMPTS[0], PROMPTS[1]], [SamplingParams(), impossible])
    with pytest.raises(RequestError, match="rules that leave none"):
        list(llm.stream(PROMPTS[0], impossible))
    assert len(tokens(llm.generate(PROMPTS[0], SamplingParams(**GREEDY)))[0]) == 8


def take_whole_pass(harvest, logits):
    """In two halves, as if a slot held no more."""
    verification = Verification()
    half = len(logits) // 2
    for first in (0, half):
        harvest.take(first, Unverified(logits[first : first + half], verification))
    verification.end()


@pytest.mark.parametrize("token_is_drawn", [True, False], ids=["drawn", "of the prompt"])
def test_logits_that_are_no_numbers_are_a_fault_of_the_pass(token_is_drawn):
    params = SamplingParams(prompt_logprobs=1)
    completions = [Completion([1, 2, 3], params, 8, (), None, vocab_size=4) for _ in range(2)]
    batch = [(each, Chunk(0, 0, [1, 2, 3], 3)) for each in completions]
    harvest = Harvest(batch, Statistics(), are_own=False)
    logits = np.zeros((6, 4), np.float32)
    logits[5 if token_is_drawn else 4, 2] = np.nan
    take_whole_pass(harvest, logits)
    with pytest.raises(ProtocolError, match="logits"):
        harvest.bring_in()
    assert [completion.token_ids for completion in completions] == [[], []]
    assert [completion.prompt_scores for completion in completions] == [[], []]
    # Where the arithmetic is this process's own, they are one request's.
    harvest = Harvest(batch, Statistics(), are_own=True)
    take_whole_pass(harvest, logits)
    harvest.bring_in()
    assert [harvest.give(completion) for completion in completions] == [True, False]
    assert isinstance(completions[1].error, NumericsError)
    assert [len(completion.prompt_scores) for completion in completions] == [2, 0]


def test_several_completions_are_drawn_apart_and_each_as_it_is_alone(llm):
    params = {"max_tokens": 12, "ignore_eos": True, "seed": 2**64 - 1}
    (output,) = llm.generate(PROMPTS[1], SamplingParams(n=6, logprobs=0, prompt_logprobs=0, **params))
    assert [one.index for one in output.outputs] == list(range(6))
    assert {one.seed for one in output.outputs} == {output.seed} == {2**64 - 1}
    drawn = [tuple(one.token_ids) for one in output.outputs]
    assert len(set(drawn)) == 6
    assert len(output.prompt_logprobs) == len(PROMPTS[1])
    (fewer,) = llm.generate(PROMPTS[1], SamplingParams(n=2, **params))
    assert [tuple(one.token_ids) for one in fewer.outputs] == drawn[:2]
    bars = []

    class Bar:
        def __init__(self, total: int, **_: object) -> None:
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, count: int) -> None:
            self.done += count

        def close(self) -> None:
            pass

    llm.generate(PROMPTS, SamplingParams(n=2, **params), use_tqdm=Bar)
    assert [(bar.total, bar.done) for bar in bars] == [(3, 3)]
    with pytest.raises(RequestError, match="n: got 2, expected 1, as one completion is started"):
        llm.start(PROMPTS[1], SamplingParams(n=2))


def test_a_seed_gives_the_same_tokens_alone_and_in_company(llm):
    params = [SamplingParams(max_tokens=16, seed=seed, ignore_eos=True) for seed in (1, 2, 3)]
    alone = [llm.generate(prompt, each)[0].outputs for prompt, each in zip(PROMPTS, params, strict=True)]
    assert [output.outputs for output in llm.generate(PROMPTS, params)] == alone
    company = [*PROMPTS, *PROMPTS]
    assert [output.outputs for output in llm.generate(company, [*params, *params])] == alone * 2


def test_a_seed_that_was_drawn_is_told_and_repeats_its_tokens(llm):
    asked = {"max_tokens": 16, "ignore_eos": True, "n": 2}
    (first,) = llm.generate(PROMPTS[1], SamplingParams(**asked))
    (second,) = llm.generate(PROMPTS[1], SamplingParams(**asked))
    assert first.seed != second.seed
    assert tokens([first]) != tokens([second])
    (again,) = llm.generate(PROMPTS[1], SamplingParams(**asked, seed=first.seed))
    assert again.outputs == first.outputs
    (greedy,) = llm.generate(PROMPTS[1], SamplingParams(**GREEDY))
    assert greedy.seed is None


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids: got 262, expected token ids, 0 to 261"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias: got 262"),
        ({"allowed_token_ids": [1, 10_000]}, "allowed_token_ids: got 10000"),
        ({"logprobs": VOCAB + 1}, "logprobs: got 263, expected at most 262, the size of the vocabulary"),
        ({"prompt_logprobs": VOCAB + 1}, "prompt_logprobs: got 263"),
    ],
)
def test_params_that_do_not_fit_the_model_are_named(llm, params, said):
    with pytest.raises(RequestError, match=said):
        llm.generate(PROMPTS[0], SamplingParams(**params))


def with_generation_config(folder: Path, target: Path, config: object) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "generation_config.json":
            (target / path.name).symlink_to(path)
    (target / "generation_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("config", "meant"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 20,
                "min_p": 0.05,
                "repetition_penalty": 1.1,
            },
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
        ),
        ({"do_sample": True, "top_k": 0, "top_p": None, "typical_p": 1.0, "num_beams": 1}, {"temperature": 1.0}),
    ],
)
def test_generation_config_says_how_a_request_without_params_is_sampled(tmp_path, config, meant):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    expected = {"temperature": 0.0, **meant}
    assert SamplingParams(**sampling_fields(tmp_path)) == SamplingParams(**expected)


def test_a_request_without_params_is_sampled_as_the_model_says(fast, model, llm, tmp_path):
    assert llm.get_default_sampling_params() == UNASKED
    assert (UNASKED.temperature, UNASKED.max_tokens) == (0.0, 64)
    (output,) = llm.generate(PROMPTS[0])
    assert (output.seed, len(output.outputs[0].token_ids)) == (None, 64)
    folder = with_generation_config(model, tmp_path / "sampled", {"do_sample": True, "top_k": 5})
    with fast.llm(folder, **LIMITS) as sampled:
        (output,) = sampled.generate(PROMPTS[0])
        params = SamplingParams(top_k=5, max_tokens=64, seed=output.seed)
        assert sampled.generate(PROMPTS[0], params)[0].outputs == output.outputs
        assert sampled.start(PROMPTS[0]).params == sampled.get_default_sampling_params()


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"do_sample": True, "top_p": 1.5}, ModelFileError, "generation_config.json: top_p: got 1.5"),
        ({"do_sample": True, "temperature": "hot"}, ModelFileError, "temperature: got 'hot'"),
        ({"no_repeat_ngram_size": 3}, UnsupportedModel, "no_repeat_ngram_size = 3; supported: sampling as"),
        ({"num_beams": 4}, UnsupportedModel, "num_beams = 4"),
    ],
)
def test_a_generation_config_that_cannot_be_followed_asks_for_params(fast, model, tmp_path, config, error, said):
    with fast.llm(with_generation_config(model, tmp_path / "odd", config), **LIMITS) as llm:
        with pytest.raises(error, match=said):
            llm.generate(PROMPTS[0])
        assert len(tokens(llm.generate(PROMPTS[0], SamplingParams(**GREEDY)))[0]) == 8
