"""Logits agree with transformers': to 1e-4 in float32, and in bfloat16 no worse than transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    CONFIG_CLASSES,
    DEVICES,
    FastStart,
    RandomModel,
    fast_start,
    model_folder,
    pooled,
    random_token_ids,
    relative_distance,
    rms_distance,
    transformers_logits,
    transformers_model,
)

from tsqp_shm import _native

FLOAT32_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 1.1
MAX_MODEL_LEN = 300

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1_000.0, "factor": 3.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
# transformers wants a hidden_size that the number of heads divides, though head_dim is given.
MQA = {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 80}


@dataclass(frozen=True)
class Case:
    """A random model, the limits it runs under, and the lengths of the sequences it is given."""

    name: str
    model: RandomModel
    lengths: tuple[int, ...] = (1, 2, 65, 300)
    limits: dict[str, Any] = field(default_factory=dict)


def _case(name: str, family: str, fields: dict[str, Any], limits: dict[str, Any] | None = None, **model: Any) -> Case:
    return Case(name, RandomModel(family, fields, **model), limits=limits or {})


CASES = [
    _case("gqa", "llama", {}),
    _case("mha, tied", "llama", {**MHA, "tie_word_embeddings": True, "rope_parameters": DEFAULT_ROPE}),
    _case(
        "mqa, linear rope, old form",
        "llama",
        {**MQA, "rope_parameters": LINEAR_ROPE},
        {"max_batch_tokens": 37, "tile_rows": 16, "block_rows": 16, "max_num_seqs": 1},
        old_rope_form=True,
        stored_as="float32",
    ),
    _case(
        "every bias, llama3 rope",
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
        {"tile_rows": 13, "tiles_in_flight": 3, "block_rows": 20},
        stored_as="float16",
    ),
    _case(
        "attention bias, llama3 rope, old form, tied",
        "llama",
        {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        {"max_batch_tokens": 101},
        old_rope_form=True,
    ),
    _case(
        "mlp bias, yarn rope, default head_dim, shards",
        "llama",
        {**MHA, "hidden_size": 80, "head_dim": None, "mlp_bias": True, "rope_parameters": YARN_ROPE},
        shards=True,
    ),
    _case("old form, theta, one layer", "llama", {"num_hidden_layers": 1, "rms_norm_eps": 1e-3}, old_rope_form=True),
    _case("window 16", "mistral", {"sliding_window": 16}),
    _case(
        "window 7, mqa, tiles of 16",
        "mistral",
        {**MQA, "sliding_window": 7, "rope_parameters": DEFAULT_ROPE},
        {"tile_rows": 16, "tiles_in_flight": 3, "block_rows": 1},
    ),
    _case("no window, mha, tied", "mistral", {**MHA, "sliding_window": None, "tie_word_embeddings": True}),
    _case(
        "window 100, chunks, yarn rope",
        "mistral",
        {"sliding_window": 100, "rope_parameters": YARN_ROPE},
        {"max_batch_tokens": 37, "max_num_seqs": 2},
        old_rope_form=True,
    ),
    _case("window 1", "mistral", {"sliding_window": 1, "rope_parameters": LINEAR_ROPE}),
    _case(
        "window of the tile, llama3 rope",
        "mistral",
        {"sliding_window": 64, "rope_parameters": LLAMA3_ROPE},
        {"tile_rows": 64, "max_batch_tokens": 128},
        stored_as="float32",
    ),
    _case("window longer than the sequence", "mistral", {**MHA, "sliding_window": 301}, old_rope_form=True),
    _case("full attention", "qwen2", {}),
    _case("mha, tied, yarn rope", "qwen2", {**MHA, "tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
    _case(
        "mqa, window from the second layer on",
        "qwen2",
        {**MQA, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        {"tile_rows": 24},
    ),
    _case(
        "layer_types, chunks",
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {"max_batch_tokens": 50},
        stored_as="float16",
    ),
    _case("window that is off", "qwen2", {"sliding_window": 9, "use_sliding_window": False}, old_rope_form=True),
    _case("llama3 rope, old form", "qwen2", {"rope_parameters": LLAMA3_ROPE}, old_rope_form=True, shards=True),
    _case("linear rope, one layer", "qwen2", {"num_hidden_layers": 1, "rope_parameters": LINEAR_ROPE}),
]


@pytest.fixture(scope="module", params=DEVICES)
def fast(request) -> Iterator[FastStart]:
    with fast_start(request.param) as starter:
        yield starter


def our_logits(fast: FastStart, case: Case, dtype: str) -> list[np.ndarray]:
    """Shapes: [T, V] f32 for each of the case's lengths."""
    with fast.llm(model_folder(case.model), dtype=dtype, max_model_len=MAX_MODEL_LEN, **case.limits) as llm:
        return [llm.logits(random_token_ids(length, seed=length)) for length in case.lengths]


def true_logits(case: Case, dtype: torch.dtype = torch.float32, attention: str = "eager") -> list[np.ndarray]:
    folder = model_folder(case.model)
    return [
        transformers_logits(folder, random_token_ids(length, seed=length), dtype, attention) for length in case.lengths
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model.family}: {case.name}")
def test_float32_logits_are_those_of_transformers(fast: FastStart, case: Case):
    for ours, truth in zip(our_logits(fast, case, "float32"), true_logits(case), strict=True):
        assert ours.shape == truth.shape
        assert relative_distance(ours, truth) < FLOAT32_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIG_CLASSES)
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(fast: FastStart, family: str, record_property):
    ours, eager, sdpa = [], [], []
    for case in CASES:
        if case.model.family != family:
            continue
        truth = true_logits(case)
        for distances, logits in (
            (ours, our_logits(fast, case, "bfloat16")),
            (eager, true_logits(case, torch.bfloat16, "eager")),
            (sdpa, true_logits(case, torch.bfloat16, "sdpa")),
        ):
            distances += map(rms_distance, logits, truth)
    record_property("rms", {"ours": pooled(ours), "eager": pooled(eager), "sdpa": pooled(sdpa)})
    print(f"{family}: ours {pooled(ours):.5f}, eager {pooled(eager):.5f}, sdpa {pooled(sdpa):.5f}")
    # The better of transformers' two ways.
    assert pooled(ours) <= BFLOAT16_TOLERANCE * min(pooled(eager), pooled(sdpa))


TEXT = """The library was quiet in the early afternoon. Two students shared a table by the window, and between them
lay a map of the coast, a ruler, and the notes of somebody who had sailed along it three hundred years
before. "He writes that the cape lies four leagues to the north-west," said one of them, "but that cannot
be right: from there he could not have seen the lighthouse." The other one thought about it. "Unless,"
she said slowly, "there was another lighthouse then." They looked at the map again. It was printed in
1962, cost £3.50, and showed depths in metres; nothing on it was older than the harbour wall. def
distance(a, b): return ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5"""


@pytest.mark.slow
def test_demo_model_logits_on_text_are_those_of_transformers(demo_model, monkeypatch):
    from tsqp_shm import LLM

    limits = {"max_model_len": 256, "max_batch_tokens": 256}
    with LLM(demo_model, dtype="float32", **limits) as llm:
        token_ids = tuple(llm.tokenizer.encode(TEXT))
        float32 = llm.logits(token_ids)
    bfloat16 = {}
    for name in _native.instruction_sets():
        # The GPU process's products differ, in the order of additions; the TEE's kernels do not.
        monkeypatch.setenv("TSQP_SHM_ISA", name)
        with LLM(demo_model, **limits) as llm:
            bfloat16[name] = rms_distance(llm.logits(token_ids), transformers_logits(demo_model, token_ids))

    truth = transformers_logits(demo_model, token_ids)
    theirs = [
        rms_distance(transformers_logits(demo_model, token_ids, torch.bfloat16, attention), truth)
        for attention in ("eager", "sdpa")
    ]
    # 135 million parameters, three times over.
    transformers_model.cache_clear()
    print(f"demo: float32 {relative_distance(float32, truth):.2e}; ours {bfloat16}, theirs {theirs}")
    assert len(token_ids) > 150
    assert relative_distance(float32, truth) < FLOAT32_TOLERANCE
    assert max(bfloat16.values()) <= BFLOAT16_TOLERANCE * min(theirs)
