"""Another GPU process in the place of one that died: the same tokens as if none had."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import FastStart, RandomModel, fast_start, model_folder, random_token_ids

from tsqp_shm import LLM, SamplingParams

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, top_k=20, seed=5)
# Longer than a step may be, of different lengths, and more than may run at once.
PROMPTS = [list(random_token_ids(length, seed=length)) for length in (3, 40, 17, 70)]
LIMITS = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 3, "max_batch_tokens": 32}


@pytest.fixture(scope="module")
def fast() -> Iterator[FastStart]:
    with fast_start() as starter:
        yield starter


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def gpu_pid(llm: LLM) -> int:
    return llm.bring_up()["processes"]["gpu"]["pid"]


def kill_gpu(llm: LLM) -> None:
    os.kill(gpu_pid(llm), signal.SIGKILL)


def kill_gpu_at_records(monkeypatch, llm: LLM, *numbers: int) -> None:
    """Kills the GPU process of the moment when so many records have been sent to it, counted over all of them."""
    submit = type(llm._border.queue).submit
    sent = 0

    def submit_and_kill(queue, *arguments, **keywords):
        nonlocal sent
        result = submit(queue, *arguments, **keywords)
        sent += 1
        if sent in numbers:
            kill_gpu(llm)
        return result

    monkeypatch.setattr(type(llm._border.queue), "submit", submit_and_kill)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_tokens_are_those_of_a_run_without_a_fault(fast, model, monkeypatch, params):
    """One dies while a prompt is in progress, one in the middle of the answers, one near their end."""
    said = []
    with fast.llm(model, **LIMITS, restart_gpu=3, report=said.append) as llm:
        expected = tokens(llm.generate(PROMPTS, params))
        first = gpu_pid(llm)
        kill_gpu_at_records(monkeypatch, llm, 14, 120, 300)
        assert tokens(llm.generate(PROMPTS, params)) == expected
        monkeypatch.undo()
        assert llm.statistics.gpu_restarts == 3
        assert gpu_pid(llm) != first
        assert llm.stats()["processes"]["gpu"]["restarts"] == 3
        assert tokens(llm.generate(PROMPTS, params)) == expected
    assert [line for line in said if "restart" in line] == [
        f"the gpu process died (no heartbeat for {said_s} s)\nrestart {number} of 3"
        for number, line in enumerate((line for line in said if "restart" in line), 1)
        for said_s in [line.split("for ")[1].split(" s")[0]]
    ]
