"""Greedy answers of the default mode part from float32's no sooner than those of transformers in bfloat16 do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import transformers_model

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.bench.quality.agreement import FIRST_IDS, Agreement, agreement
from tsqp_shm.bench.quality.questions import QUESTIONS

PARAMS = SamplingParams(temperature=0, max_tokens=FIRST_IDS)


def answers_of_transformers(folder, prompts: list[list[int]], dtype: torch.dtype) -> list[list[int]]:
    model = transformers_model(folder, dtype, "sdpa")
    eos = model.generation_config.eos_token_id
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": FIRST_IDS, "pad_token_id": eos}
            sequence = model.generate(ids, do_sample=False, **given)[0, len(prompt) :].tolist()
            answers.append(sequence[: sequence.index(eos) + 1] if eos in sequence else sequence)
    return answers


@pytest.fixture(scope="module")
def llm(demo_model) -> Iterator[LLM]:
    with LLM(demo_model, max_model_len=128) as llm:
        yield llm


def compared(llm: LLM, folder, prompts: list[list[int]]) -> tuple[Agreement, Agreement]:
    """Ours and transformers' in bfloat16 with transformers' in float32."""
    truth = answers_of_transformers(folder, prompts, torch.float32)
    theirs = answers_of_transformers(folder, prompts, torch.bfloat16)
    transformers_model.cache_clear()
    # One after the other, as a person asks.
    ours = [list(llm.generate([prompt], PARAMS)[0].outputs[0].token_ids) for prompt in prompts]
    return agreement(ours, truth), agreement(theirs, truth)


def prompts_of(llm: LLM, questions: tuple[str, ...], is_chat: bool) -> list[list[int]]:
    if not is_chat:
        return [list(llm.tokenizer.encode(question)) for question in questions]
    texts = [llm.tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    return [list(llm.tokenizer.encode(text, add_special_tokens=False)) for text in texts]


@pytest.mark.slow
def test_the_capital_of_france_is_paris(llm):
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], PARAMS)[0].outputs[0]
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")


@pytest.mark.long
@pytest.mark.parametrize("is_chat", [True, False])
def test_of_twenty_questions_as_many_answers_agree_with_float32_as_of_transformers_in_bfloat16(
    llm, demo_model, is_chat
):
    ours, theirs = compared(llm, demo_model, prompts_of(llm, QUESTIONS, is_chat))
    assert ours.answers == 20
    assert ours.whole >= theirs.whole
    assert ours.ids >= theirs.ids


def test_agreement_counts_from_the_beginning_on():
    truth = [[1, 2, 3], list(range(40)), [5], [7, 8]]
    answers = [[1, 2, 3], [*range(20), 0], [6], [7, 8, 9]]
    assert agreement(answers, truth) == Agreement(4, 2, (3 + 16 + 0 + 2) / 4, (3 + 16 + 1 + 2) / 4)
    assert agreement([[1]], [[1, 2]]) == Agreement(1, 0, 1.0, 2.0)
