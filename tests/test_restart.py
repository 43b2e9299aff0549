"""Another GPU process in the place of one that died: the same tokens as if none had."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import numpy as np
import pytest
from models import FastStart, RandomModel, model_folder, random_token_ids

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import PeerDied
from tsqp_shm.shm.posix.folder import sessions_folder
from tsqp_shm.shm.transport import Hold

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
SEEDED = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, top_k=20, seed=5)
# Longer than a step may be, of different lengths, and more than may run at once.
PROMPTS = [list(random_token_ids(length, seed=length)) for length in (3, 40, 17, 70)]
LIMITS = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 3, "max_batch_tokens": 32}


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def gpu_pid(llm: LLM) -> int:
    return llm.bring_up()["processes"]["gpu"]["pid"]


def kill_gpu(llm: LLM) -> None:
    os.kill(gpu_pid(llm), signal.SIGKILL)


def starts(fast: FastStart, model: Path, *deaths: int):
    """What starts GPU processes: each kills itself at the submission of that number, the last ones at none."""
    left = list(deaths)

    def start(session: Hold) -> None:
        fast.start_gpu(model, session, dies_at=left.pop(0) if left else 0)

    return start


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_tokens_are_those_of_a_run_without_a_fault(fast, model, params):
    """One dies while a prompt is in progress, one in the middle of the answers, one near their end."""
    said = []
    with fast.llm(model, **LIMITS) as llm:
        expected = tokens(llm.generate(PROMPTS, params))
    # The first submission of each is READY.
    start_gpu = starts(fast, model, 15, 107, 181)
    with LLM(model, start_gpu=start_gpu, **LIMITS, restart_gpu=3, report=said.append) as llm:
        first = gpu_pid(llm)
        assert tokens(llm.generate(PROMPTS, params)) == expected
        assert llm.statistics.gpu_restarts == 3
        assert gpu_pid(llm) != first
        assert llm.stats()["processes"]["gpu"]["restarts"] == 3
        facts = llm.stats()
        calls = sum(row["calls"] for row in facts["operations"] if row["side"] == "gpu")
        assert sum(facts["doorbell"]["waits"].values()) == calls
        assert len(list((sessions_folder() / llm.bring_up()["session"]).glob("doorbell*"))) == 1
        assert tokens(llm.generate(PROMPTS, params)) == expected
    restarts = [line.splitlines() for line in said if "restart" in line]
    assert [line for _, line in restarts] == [f"restart {number} of 3" for number in (1, 2, 3)]
    assert all(line.startswith("the gpu process died (") for line, _ in restarts)


def test_logits_are_computed_again(fast, model):
    with LLM(model, start_gpu=starts(fast, model, 31), **LIMITS, restart_gpu=1) as llm:
        logits = llm.logits(PROMPTS[3])
        assert llm.statistics.gpu_restarts == 1
        expected = llm.logits(PROMPTS[3])
        assert np.abs(logits - expected).max() < 1e-4 * expected.std()


def test_one_that_was_only_believed_dead_cannot_reach_what_comes_after(fast, model):
    with fast.llm(model, **LIMITS, restart_gpu=1) as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
        old = gpu_pid(llm)
        pidfd = os.pidfd_open(old)
        os.kill(old, signal.SIGSTOP)
        try:
            assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        finally:
            os.kill(old, signal.SIGCONT)
        # In its arena there is no TEE process any more.
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        assert gpu_pid(llm) != old


class Doomed:
    """A GPU process that dies while it comes up."""

    def death(self):
        return PeerDied("gpu", "exit code 9")

    def stop(self):
        pass

    kill = stop


def first_well_then(fast, model, then):
    """Starts a GPU process at first, and after that calls `then`."""
    started = []

    def start(session):
        started.append(session)
        return fast.start_gpu(model, session) if len(started) == 1 else then()

    return start, started


def test_without_a_restart_left_the_session_ends_by_the_last_death(fast, model):
    start, started = first_well_then(fast, model, Doomed)
    with LLM(model, start_gpu=start, **LIMITS, restart_gpu=2) as llm:
        kill_gpu(llm)
        with pytest.raises(PeerDied, match="exit code 9") as caught:
            llm.generate(PROMPTS, GREEDY)
        with pytest.raises(PeerDied) as again:
            llm.generate(PROMPTS, GREEDY)
        assert str(again.value) == str(caught.value)
        assert len(started) == 3
        assert llm.stats()["processes"]["gpu"]["restarts"] == 2


@pytest.mark.long
def test_however_many_die_while_they_come_up_there_is_one_in_time_or_none(fast, model):
    start, started = first_well_then(fast, model, Doomed)
    with LLM(model, start_gpu=start, **LIMITS, restart_gpu=1_000_000, timeout_s=4.0) as llm:
        kill_gpu(llm)
        with pytest.raises(PeerDied, match="exit code 9"):
            llm.generate(PROMPTS, GREEDY)
        assert 3 < len(started) < 1_000_000


def test_ctrl_c_while_another_is_waited_for_ends_the_caller_s_wait_alone(fast, model):
    """Nobody answers the second time until the test has one started; whoever asks then is served by it."""
    start, started = first_well_then(fast, model, lambda: os.kill(os.getpid(), signal.SIGINT))
    with LLM(model, start_gpu=start, **LIMITS, restart_gpu=2) as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
        kill_gpu(llm)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
        fast.start_gpu(model, started[1])
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_closing_does_not_wait_for_one_that_does_not_come(fast, model):
    start, _ = first_well_then(fast, model, lambda: os.kill(os.getpid(), signal.SIGINT))
    with LLM(model, start_gpu=start, **LIMITS, restart_gpu=2, timeout_s=3600.0) as llm:
        kill_gpu(llm)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)


@pytest.mark.slow
def test_its_own_gpu_process_is_replaced_and_its_death_explained(model):
    said = []
    with LLM(model, **LIMITS, restart_gpu=1, report=said.append) as llm:
        expected = tokens(llm.generate(PROMPTS, SEEDED))
        kill_gpu(llm)
        assert tokens(llm.generate(PROMPTS, SEEDED)) == expected
        # The thread that has started it has all signals blocked; this one must end by the polite one.
        status = Path(f"/proc/{gpu_pid(llm)}/status").read_text()
        blocked = int(status.split("SigBlk:")[1].split()[0], 16)
        assert not blocked & 1 << signal.SIGTERM - 1
    assert any(line.startswith("the gpu process died (signal SIGKILL)") for line in said)


def test_drawn_tokens_and_log_probabilities_are_those_of_a_run_without_a_fault(fast, model):
    """One dies while a prompt is scored, one in the middle of the answers: nothing is drawn or scored twice."""
    params = SamplingParams(n=2, max_tokens=12, ignore_eos=True, seed=7, logprobs=2, prompt_logprobs=1)

    def values(outputs) -> tuple[list, np.ndarray]:
        """Tokens, and what is known to the last bits only: a cache is filled again in other shapes."""
        completions = [completion for output in outputs for completion in output.outputs]
        found = [each for output in outputs for each in output.prompt_logprobs[1:]]
        found += [each for completion in completions for each in completion.logprobs]
        chosen = np.array([(token, one.logprob) for each in found for token, one in list(each.items())[:1]])
        return [completion.token_ids for completion in completions], chosen

    with fast.llm(model, **LIMITS) as llm:
        expected, expected_scores = values(llm.generate(PROMPTS, params))
    with LLM(model, start_gpu=starts(fast, model, 40, 130), **LIMITS, restart_gpu=2) as llm:
        token_ids, scores = values(llm.generate(PROMPTS, params))
        assert llm.statistics.gpu_restarts == 2
    assert token_ids == expected
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


def test_waiting_for_a_gpu_process_to_come_up_is_no_waiting_for_what_was_asked(fast, model):
    with fast.llm(model, **LIMITS) as llm:
        statistics = llm.statistics
        assert statistics.start_waiting_ns > 0
        assert statistics.waiting_ns == 0
        llm.generate([[1]], SamplingParams(max_tokens=2), use_tqdm=False)
        assert 0 < statistics.waiting_ns < statistics.submissions.waiting_ns
