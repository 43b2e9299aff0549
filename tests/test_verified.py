"""Mode `verified`: the bits of `tee-only`, whatever computes them and whatever becomes of the GPU process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from local_session import LocalGpus
from models import RandomModel, model_folder, random_token_ids
from safetensors.torch import load_file, save_file
from test_parity import CASES

from tsqp_shm import LLM, SamplingParams, _native
from tsqp_shm.errors import ArenaMismatch, ConfigError, ModelFileError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec

FIELD = 2**31 - 1
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
DRAWN = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=5, logprobs=2, prompt_logprobs=1)
# Longer than a step may be, of different lengths, and more than may run at once.
PROMPTS = [list(random_token_ids(length, seed=length)) for length in (3, 40, 17, 70)]
LIMITS = {"max_model_len": 96, "max_num_seqs": 3, "max_batch_tokens": 32, "block_rows": 16}


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


@contextmanager
def logits_beside_the_tee_alone(fast, case, **settings) -> Iterator[LLM]:
    """A session whose logits are those of `tee-only`, to the bit."""
    folder = model_folder(case.model)
    limits = {name: value for name, value in case.limits.items() if name not in ("tile_rows", "tiles_in_flight")}
    limits = {"max_model_len": 320, **limits}
    sequences = [random_token_ids(min(length, limits["max_model_len"]), seed=length) for length in case.lengths]
    with LLM(folder, mode="tee-only", **limits) as llm:
        expected = [llm.logits(ids) for ids in sequences]
    with fast.llm(folder, **settings, **limits) as llm:
        for ids, logits in zip(sequences, expected, strict=True):
            assert np.array_equal(llm.logits(ids), logits)
        yield llm


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_the_tee_alone_to_the_bit(fast, case):
    with logits_beside_the_tee_alone(fast, case, mode="verified"):
        pass


def answers(llm: LLM, params: SamplingParams, prompts: list[list[int]] = PROMPTS) -> list[object]:
    """All that is told of a batch, but for times and ids."""
    outputs = llm.generate(prompts, params)
    return [
        (one.token_ids, one.finish_reason, one.logprobs, output.prompt_logprobs)
        for output in outputs
        for one in output.outputs
    ]


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_ragged_batch_says_what_it_says_in_the_tee_alone(fast, model, params, threads):
    with LLM(model, mode="tee-only", **LIMITS) as llm:
        expected = answers(llm, params)
    with fast.llm(model, mode="verified", tee_threads=threads, gpu_threads=threads, **LIMITS) as llm:
        assert answers(llm, params) == expected


@pytest.mark.parametrize(
    ("others", "most", "mode"),
    [
        (7, 32, "verified"),
        (7, 512, "blinded"),
        *(
            pytest.param(others, most, mode, marks=pytest.mark.long)
            for others in (0, 1, 7)
            for most in (32, 512)
            for mode in ("verified", "blinded")
        ),
    ],
)
def test_what_it_says_does_not_depend_on_the_batch_or_on_where_a_prompt_is_cut(fast, model, others, most, mode):
    """Batches of 1, 2 and 8; a prompt of three blocks of rows whole, and in pieces beside others. Of `blinded` some
    rows find pads, and some do not."""
    prompts = [list(random_token_ids(length, seed=length)) for length in (290, 5, 17, 40, 3, 9, 70, 1)][: 1 + others]
    limits = {"max_model_len": 320, "max_num_seqs": 8}
    with LLM(model, mode="tee-only", **limits) as llm:
        alone = [answers(llm, DRAWN, [prompt])[0] for prompt in prompts]
    with fast.llm(model, mode=mode, max_batch_tokens=most, block_rows=128, **limits) as llm:
        assert answers(llm, DRAWN, prompts) == alone


@pytest.mark.parametrize("params", [pytest.param(GREEDY, marks=pytest.mark.long), DRAWN], ids=["greedy", "drawn"])
def test_another_gpu_process_goes_on_where_one_died(fast, model, params):
    with fast.llm(model, mode="verified", **LIMITS) as llm:
        expected = answers(llm, params)
        submissions = llm.statistics.doorbells
    said: list[str] = []
    deaths = [15, 60, 70]

    def start_gpu(session):
        fast.start_gpu(model, session, dies_at=deaths.pop(0) if deaths else 0)

    with LLM(
        model, mode="verified", start_gpu=start_gpu, restart_gpu=3, timeout_s=30.0, report=said.append, **LIMITS
    ) as llm:
        assert answers(llm, params) == expected
        assert llm.statistics.gpu_restarts == 3
        # The passes that were broken off are computed again, and no other: a pass has nine submissions and a block more
        # of them where it has more rows.
        assert llm.statistics.doorbells - submissions < 3 * 30
    assert sum("the gpu process is back" in line for line in said) == 3


def test_vectors_are_of_the_field_and_drawn_anew_for_each_linear_and_each_gpu_process(fast, model, monkeypatch):
    """Nobody can choose them, so what they are to be is looked at: uniform, as far as a few thousand words tell."""
    drawn: list[np.ndarray] = []

    class Seen(_native.FieldCheck):
        def __init__(self, linear, vectors, *others):
            super().__init__(linear, vectors, *others)
            drawn.append(vectors.copy())

    monkeypatch.setattr(_native, "FieldCheck", Seen)
    deaths = [15]

    def start_gpu(session):
        fast.start_gpu(model, session, dies_at=deaths.pop() if deaths else 0)

    with LLM(model, mode="verified", start_gpu=start_gpu, restart_gpu=1, timeout_s=30.0, **LIMITS) as llm:
        llm.generate(PROMPTS, GREEDY)
        assert llm.statistics.gpu_restarts == 1
    network = Network.of(ModelSpec.from_folder(model))
    assert [vectors.shape for vectors in drawn] == [(2, linear.outputs) for linear in network.linears] * 2
    words = np.concatenate([vectors.ravel() for vectors in drawn])
    assert words.max() < FIELD
    # Of 8,000 words of 31 bits a few may be equal by chance.
    assert len(np.unique(words)) > len(words) - 5
    # Within 6 deviations.
    deviation = FIELD / np.sqrt(12 * len(words))
    assert abs(words.mean() - FIELD / 2) < 6 * deviation
    ones = (words[:, None] >> np.arange(31, dtype=np.uint32) & 1).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 6 * 0.5 / np.sqrt(len(words))


def test_files_that_have_changed_are_not_taken_for_another_gpu_process(fast, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)

    def start_gpu(session):
        fast.start_gpu(folder, session, dies_at=5)

    with LLM(folder, mode="verified", start_gpu=start_gpu, restart_gpu=1, timeout_s=30.0) as llm:
        change_one_weight(folder)
        with pytest.raises(ModelFileError, match="changed since the session began"):
            llm.generate([[1, 2, 3]], GREEDY)


def change_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    rows = weights["model.layers.1.mlp.down_proj.weight"]
    rows[3] = -rows[3]
    # Whoever has the old file mapped keeps it.
    save_file(weights, folder / "changed.safetensors", {"format": "pt"})
    (folder / "changed.safetensors").rename(folder / "model.safetensors")


def test_a_gpu_process_with_other_weights_is_one_line_before_the_first_product(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    change_one_weight(folder)
    gpus = LocalGpus(folder)
    with pytest.raises(ArenaMismatch, match="the model's linears_digest differs: expected sha256:"):
        LLM(model, mode="verified", transport=gpus.transport, start_gpu=gpus.start, timeout_s=10.0)


@pytest.mark.parametrize(
    "setting", [{"tile_rows": 16}, {"tiles_in_flight": 2}, {"check_finite": True}, {"dtype": "float32"}]
)
def test_a_setting_of_split_attention_is_refused(model, setting):
    with pytest.raises(ConfigError, match="none, as mode verified"):
        LLM(model, mode="verified", **setting)
