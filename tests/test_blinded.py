"""Mode `blinded`: the bits of `tee-only`, whatever becomes of its pads and of the GPU process."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from models import RandomModel, model_folder, random_token_ids
from test_parity import CASES
from test_verified import DRAWN, GREEDY, LIMITS, PROMPTS, answers, logits_beside_the_tee_alone

from tsqp_shm import LLM, _native
from tsqp_shm.errors import ConfigError, PadsExhausted, RequestError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.protocol import Opcode
from tsqp_shm.tee.submission import SubmissionQueue

# Everything crosses.
ALL_CROSS = {"pads_out": "wait", "prefill": "gpu"}


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


def pads_of(llm: LLM) -> dict[str, Any]:
    found: dict[str, Any] = llm.stats()["pads"]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_the_tee_alone_to_the_bit(fast, case):
    with logits_beside_the_tee_alone(fast, case, mode="blinded", **ALL_CROSS, pad_stock=600) as llm:
        assert pads_of(llm)["tee_products"] == 0


@pytest.fixture(scope="module")
def expected(model) -> dict[str, list[object]]:
    with LLM(model, mode="tee-only", **LIMITS) as llm:
        return {"greedy": answers(llm, GREEDY), "drawn": answers(llm, DRAWN)}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**ALL_CROSS, "pad_stock": 300}, id="all cross"),
        pytest.param({"pad_stock": 300, "pad_ready": 300, "pad_threads": 2}, id="stocked"),
        pytest.param({"pad_stock": 40, "pad_ready": 20}, id="a batch drains the stock"),
        pytest.param({"pad_stock": 5}, id="prompts are longer than the stock"),
        pytest.param({"pad_stock": 300, "pad_threads": 0}, id="nobody makes any"),
        pytest.param({"pad_stock": 300, "prefill": "tee"}, id="prompts stay"),
        pytest.param({"pad_stock": 20, "prefill": "gpu"}, id="prompts go as far as pads do"),
        pytest.param({**ALL_CROSS, "pad_stock": 300, "pad_prompt_to": 8}, id="prompts look longer"),
    ],
)
@pytest.mark.parametrize("params", [GREEDY, pytest.param(DRAWN, marks=pytest.mark.long)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_ragged_batch_says_what_it_says_in_the_tee_alone(fast, model, expected, settings, params, threads):
    said = expected["greedy" if params is GREEDY else "drawn"]
    if "pad_prompt_to" in settings:
        # Scores of a prompt would show its length.
        params, said = replace(params, prompt_logprobs=None), [(*each[:-1], None) for each in said]
    with fast.llm(model, mode="blinded", tee_threads=threads, gpu_threads=threads, **settings, **LIMITS) as llm:
        assert answers(llm, params) == said
        pads = pads_of(llm)
        assert pads["fault"] is None
        assert pads["burned"] == 0
        assert (pads["used"] == 0) == (settings.get("pad_threads") == 0)
        if settings.get("pads_out") == "wait":
            assert pads["tee_products"] == 0


def test_another_gpu_process_goes_on_with_the_same_pads_where_one_died(fast, model, expected):
    deaths = [15, 60, 70]

    def start_gpu(session):
        fast.start_gpu(model, session, dies_at=deaths.pop(0) if deaths else 0)

    with LLM(
        model, mode="blinded", start_gpu=start_gpu, restart_gpu=3, timeout_s=30.0, **ALL_CROSS, pad_stock=300, **LIMITS
    ) as llm:
        key = pads_of(llm)["key_id"]
        assert answers(llm, DRAWN) == expected["drawn"]
        pads = pads_of(llm)
        assert llm.statistics.gpu_restarts == 3
        assert pads["key_id"] == key
        # Of the passes that were broken off.
        assert pads["burned"] > 0


def test_what_has_no_pads_is_refused_and_the_others_go_on(fast, model):
    settings = {"pad_stock": 64, "pad_ready": 64, "pads_out": "refuse", "max_model_len": 160, "max_num_seqs": 2}
    long, short = list(random_token_ids(100)), list(random_token_ids(5))
    with LLM(model, mode="tee-only", max_model_len=160) as llm:
        alone = answers(llm, GREEDY, [short])
    with fast.llm(model, mode="blinded", max_batch_tokens=32, **settings) as llm:
        assert answers(llm, GREEDY, [short]) == alone
        before = pads_of(llm)["used"]
        with pytest.raises(PadsExhausted, match="needed for 100 rows, and there are"):
            llm.generate([long], GREEDY)
        with pytest.raises(PadsExhausted, match="needed for 100 rows"):
            llm.logits(long)
        # Before it has taken what others can use.
        assert pads_of(llm)["used"] == before
        completions = [llm.start(prompt, GREEDY) for prompt in (long, short)]
        updates = SimpleQueue()
        llm.runtime.add(completions, updates.put)
        while any(completion.finish_reason is None for completion in completions):
            updates.get(timeout=30)
        assert [completion.finish_reason for completion in completions] == ["error", "length"]
        assert completions[1].token_ids == alone[0][0]
        # What it needs itself, and nothing of who asks beside it.
        assert "needed for 100 rows" in str(completions[0].error)
        assert pads_of(llm)["tee_products"] == 0


def test_a_check_of_blinded_rows_begins_none_without_a_pad(monkeypatch, fast, model):
    begun = []

    class Seen(_native.FieldCheck):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            begun.append(arguments[2])

    monkeypatch.setattr(_native, "FieldCheck", Seen)
    with fast.llm(model, mode="blinded", pad_stock=16, max_model_len=64):
        assert all(begun)
    monkeypatch.undo()
    linear = _native.FieldLinear(64, 64)
    check = _native.FieldCheck(linear, np.ones((2, 64), np.uint32), True)
    slots = _native.SlotTable(None, [], mmap.mmap(-1, 8192), [(0, 1, 64, 2), (4096, 1, 64, 4)])
    with pytest.raises(ValueError, match="nothing crosses here without"):
        check.begin(slots, 0, 1, 0, 1)


@contextmanager
def watched(monkeypatch) -> Iterator[list[tuple[int, int, int]]]:
    """What the TEE asks for: (Linear, first row, rows) of each product, in their order."""
    seen: list[tuple[int, int, int]] = []
    submit = SubmissionQueue.submit

    def watching(self: SubmissionQueue, opcode: Opcode, **request: Any) -> int:
        if opcode == Opcode.LINEAR:
            seen.append((request["target"], request["first_row"], request["rows"]))
        return submit(self, opcode, **request)

    monkeypatch.setattr(SubmissionQueue, "submit", watching)
    yield seen


@pytest.mark.parametrize(
    ("to", "batch"),
    [
        (64, 32),
        (200, 256),
        *(pytest.param(*case, marks=pytest.mark.long) for case in ((16, 32), (16, 256), (64, 256), (200, 32))),
    ],
)
def test_prompts_of_other_lengths_look_the_same_where_they_are_rounded_up(fast, model, monkeypatch, to, batch):
    """Whole and in several steps, cut into blocks, beside another sequence: records, and the words of progress."""
    lengths = [to - 15, to - 9, to] if to < 64 else [to - 59, to - 9, to - 1, to]
    limits = {"max_model_len": 224, "max_num_seqs": 2, "max_batch_tokens": batch, "block_rows": 16}
    told = []
    with (
        watched(monkeypatch) as seen,
        fast.llm(model, mode="blinded", **ALL_CROSS, pad_stock=600, pad_prompt_to=to, **limits) as llm,
    ):
        for length in (1, *lengths):
            seen.clear()
            before = llm.runtime.connection.progress.progress.public()
            llm.generate([list(random_token_ids(length, seed=length)), [1, 2, 3]], GREEDY)
            after = llm.runtime.connection.progress.progress.public()
            told.append((list(seen), [now - then for now, then in zip(after, before, strict=True)]))
    # Of the first, what came before it is told with it.
    assert all(each == told[1] for each in told[2:])


def test_a_gpu_process_that_dies_sees_no_length_that_was_rounded_up(fast, model, monkeypatch):
    """Its first step is made again as it was."""
    asked = []
    for length in (41, 64):
        deaths = [5]

        def start_gpu(session, deaths=deaths):
            fast.start_gpu(model, session, dies_at=deaths.pop(0) if deaths else 0)

        settings = {**ALL_CROSS, "pad_stock": 300, "pad_prompt_to": 64, "max_model_len": 96, "max_num_seqs": 1}
        with (
            watched(monkeypatch) as seen,
            LLM(model, mode="blinded", start_gpu=start_gpu, restart_gpu=1, timeout_s=30.0, **settings) as llm,
        ):
            llm.generate([list(random_token_ids(length))], GREEDY)
            # How far a step had got when the death was noticed is not the question.
            asked.append([rows for linear, _, rows in seen if linear == 0])
    assert asked[0] == asked[1]


def test_what_would_show_a_length_is_refused_where_lengths_are_rounded_up(fast, model):
    with fast.llm(model, mode="blinded", pad_stock=64, pad_prompt_to=16, max_model_len=96) as llm:
        with pytest.raises(RequestError, match="prompt_logprobs"):
            llm.generate([[1, 2, 3]], replace(GREEDY, prompt_logprobs=1))
        with pytest.raises(RequestError, match="logits"):
            llm.logits([1, 2, 3])


def test_blocks_that_wait_for_the_same_pads_let_others_give_theirs_back(fast, model):
    """More rows are in one step than the stock has, and two blocks of them at one Linear."""
    limits = {"max_model_len": 128, "max_num_seqs": 5, "max_batch_tokens": 512, "block_rows": 64}
    prompts = [list(random_token_ids(100, seed=seed)) for seed in range(5)]
    with LLM(model, mode="tee-only", **limits) as llm:
        alone = answers(llm, GREEDY, prompts)
    with fast.llm(model, mode="blinded", **ALL_CROSS, pad_stock=200, **limits) as llm:
        assert answers(llm, GREEDY, prompts) == alone
        assert pads_of(llm)["tee_products"] == 0


def test_pads_are_waited_for_before_the_first_request_and_not_where_a_gpu_process_died(fast, model, expected):
    deaths = [15]

    def start_gpu(session):
        fast.start_gpu(model, session, dies_at=deaths.pop(0) if deaths else 0)

    settings = {"pad_stock": 300, "pad_ready": 300, "restart_gpu": 1, "timeout_s": 30.0}
    with LLM(model, mode="blinded", start_gpu=start_gpu, **settings, **LIMITS) as llm:
        assert answers(llm, GREEDY) == expected["greedy"]
        assert llm.statistics.gpu_restarts == 1


def test_what_the_arena_carries_does_not_depend_on_what_is_asked(fast, model, monkeypatch):
    """Records and the words of progress of two batches with equal lengths."""
    told = []
    with watched(monkeypatch) as seen, fast.llm(model, mode="blinded", **ALL_CROSS, pad_stock=300, **LIMITS) as llm:
        for seed in (0, 1, 2):
            seen.clear()
            before = llm.runtime.connection.progress.progress
            llm.generate([list(random_token_ids(length, seed=seed)) for length in (3, 40, 17)], GREEDY)
            after = llm.runtime.connection.progress.progress.public()
            told.append((list(seen), [now - then for now, then in zip(after, before.public(), strict=True)]))
    # Of the first, what came before it is told with it.
    assert told[1] == told[2]


def test_the_tee_keeps_the_weights_and_says_so(fast, model):
    with fast.llm(model, mode="blinded", pad_stock="1MiB", max_model_len=96) as llm:
        facts = llm.bring_up()
    assert facts["checks"]["has_weights"]
    pads = facts["pads"]
    network = Network.of(ModelSpec.from_folder(model))
    assert pads["row_bytes"] == 4 * sum(linear.outputs for linear in network.linears)
    assert pads["capacity_rows"] == (1 << 20) // pads["row_bytes"]
    assert (pads["maker"], pads["out"], pads["prefill"]) == ("direct", "tee", "auto")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"pad_stock": "many"}, "rows, as 4096, or memory"),
        ({"pad_stock": "0"}, "rows, as 4096"),
        ({"pad_stock": "1KiB"}, "at least a row"),
        ({"pad_stock": "999TiB"}, "bytes of memory that are free"),
        ({"pad_stock": "4", "pads_out": "wait"}, "at least"),
        ({"pad_stock": "4", "pad_ready": 5}, "at least 5 rows, for pad_ready"),
        ({"pad_threads": 0, "pads_out": "wait"}, "1 or more"),
        ({"pad_threads": 0, "pad_ready": 1}, "1 or more"),
        ({"pads_out": "gpu"}, "tee or wait or refuse"),
        ({"prefill": "never"}, "auto or gpu or tee"),
        ({"pad_prompt_to": -1}, "a whole number"),
    ],
)
def test_settings_that_cannot_be_are_one_error(fast, model, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        fast.llm(model, mode="blinded", max_model_len=96, **settings)


@pytest.mark.parametrize("mode", ["plain", "verified", "tee-only"])
def test_a_mode_without_pads_takes_no_setting_of_them(model, mode):
    for name, value in (("pad_stock", "4"), ("pads_out", "tee"), ("prefill", "gpu"), ("lock_memory", True)):
        with pytest.raises(ConfigError, match=f"{name}: .* mode {mode} has no pads"):
            LLM(model, mode=mode, **{name: value})


def test_prompts_of_nobody(fast, model):
    """A batch that is empty, and a prompt of a token, which is none that would be computed elsewhere."""
    with fast.llm(model, mode="blinded", pad_stock=64, pad_ready=64, max_model_len=64) as llm:
        assert llm.generate([], GREEDY) == []
        assert len(answers(llm, GREEDY, [PROMPTS[0][:1]])) == 1
