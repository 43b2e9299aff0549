"""Greedy completions are transformers', whatever shares the batch; ways of waiting change no bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from endpoints import free_tcp_endpoint
from models import (
    DEVICES,
    FastStart,
    RandomModel,
    fast_start,
    greedy_of_transformers,
    model_folder,
    random_token_ids,
    token_ids,
    transformers_model,
)

from tsqp_shm import LLM, SamplingParams, _native
from tsqp_shm.config import DOORBELLS

MODELS = {
    "llama": RandomModel("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": RandomModel("mistral", {"sliding_window": 16}),
    "qwen2": RandomModel(
        "qwen2",
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "hidden_size": 80,
            "use_sliding_window": True,
            "sliding_window": 70,
            "max_window_layers": 1,
        },
    ),
}
# Around the tiles' and the key blocks' borders, and more of them than there are caches below.
PROMPTS = [list(random_token_ids(length, seed=length)) for length in (1, 2, 7, 63, 64, 65, 100, 129, 31)]
MAX_TOKENS = 24
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)


@pytest.fixture(scope="module", params=DEVICES)
def fast(request) -> Iterator[FastStart]:
    with fast_start(request.param) as starter:
        yield starter


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Path:
    return model_folder(MODELS[request.param])


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What transformers completes in float32, each prompt alone."""
    return [greedy_of_transformers(model, [prompt], MAX_TOKENS)[0] for prompt in PROMPTS]


@pytest.mark.slow
def test_demo_model_completes_20_prompts_as_transformers_does(demo_model):
    topics = pytest.importorskip("pydoc_data.topics").topics
    longest = sorted(topics, key=lambda topic: (-len(topics[topic]), topic))[:20]
    with LLM(demo_model, dtype="float32", max_model_len=96) as llm:
        prompts = [llm.tokenizer.encode(topics[topic])[40:104] for topic in longest]
        ours = token_ids(llm.generate(prompts, SamplingParams(max_tokens=16, temperature=0)))
    assert [len(prompt) for prompt in prompts] == [64] * 20
    theirs = greedy_of_transformers(demo_model, prompts, 16)
    transformers_model.cache_clear()
    assert ours == theirs


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({}, id="whole"),
        pytest.param({"max_batch_tokens": 37, "max_num_seqs": 3}, id="chunks, three at once"),
        pytest.param({"max_batch_tokens": 1, "max_num_seqs": 1, "tile_rows": 1}, id="a token at a time"),
        pytest.param(
            {"max_batch_tokens": 64, "tile_rows": 7, "tiles_in_flight": 3, "block_rows": 10},
            id="tiles of 7, three in flight",
        ),
        pytest.param({"max_num_seqs": 2, "tile_rows": 24, "tiles_in_flight": 2}, id="tiles of 24, two at once"),
        pytest.param(
            {"max_batch_tokens": 9, "max_num_seqs": 9, "tile_rows": 5, "tiles_in_flight": 16}, id="tiny steps"
        ),
    ],
)
def test_a_batch_gives_each_prompt_what_transformers_gives_it_alone(fast, model, expected, limits):
    with fast.llm(model, dtype="float32", max_model_len=160, **limits) as llm:
        assert token_ids(llm.generate(PROMPTS, GREEDY)) == expected


def test_decode_with_the_cache_is_recomputing_from_scratch(fast, model):
    with fast.llm(model, dtype="float32", max_model_len=160) as llm:
        completions = token_ids(llm.generate(PROMPTS, GREEDY))
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            logits = llm.logits(prompt + completion[:-1])
            assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == completion


def test_a_batch_of_bfloat16_prompts_is_repeatable(fast, model):
    with fast.llm(model, max_model_len=160) as llm:
        assert token_ids(llm.generate(PROMPTS, GREEDY)) == token_ids(llm.generate(PROMPTS, GREEDY))


def test_a_prompt_and_its_completion_may_fill_the_context(fast, model):
    prompt = PROMPTS[7]
    with fast.llm(model, dtype="float32", max_model_len=len(prompt) + 5) as llm:
        (completion,) = llm.generate(prompt, GREEDY)[0].outputs
        assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
        assert completion.token_ids == greedy_of_transformers(model, [prompt], 5)[0]


@pytest.fixture
def any_instruction_set() -> Iterator[None]:
    before = _native.active_instruction_set()
    yield
    _native.use_instruction_set(before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_doorbells_instruction_sets_and_threads_change_no_bit(fast, any_instruction_set, dtype):
    prompt = random_token_ids(140)
    folder = model_folder(MODELS["qwen2"])
    results: dict[tuple, np.ndarray] = {}
    for doorbell in DOORBELLS:
        with fast.llm(folder, dtype=dtype, doorbell=doorbell, max_model_len=160) as llm:
            for name in _native.instruction_sets():
                for threads in (1, 3):
                    _native.use_instruction_set(name)
                    _native.set_num_threads(threads)
                    results[doorbell, name, threads] = llm.logits(prompt)
    assert len(results) == len(DOORBELLS) * len(_native.instruction_sets()) * 2
    reference = results["adaptive", "scalar", 1]
    differing = [key for key, logits in results.items() if not np.array_equal(logits, reference)]
    assert not differing


def numpy_features() -> str:
    """Those of this processor that numpy chooses kernels by."""
    return " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))


@pytest.mark.slow
def test_the_environment_chooses_an_instruction_set_and_changes_no_bit():
    script = """
import hashlib, sys
from tsqp_shm import LLM, SamplingParams, _native
with LLM(sys.argv[1], max_model_len=160, max_batch_tokens=50, gpu_threads=1) as llm:
    digest = hashlib.sha256(llm.logits(range(100)))
    (output,) = llm.generate(range(20), SamplingParams(n=3, seed=5, top_p=0.95, logprobs=4, repetition_penalty=1.1))
    digest.update(repr(output.outputs).encode())
    print(_native.active_instruction_set(), digest.hexdigest())
"""
    digests = set()
    # What is disabled is numpy's: no function of it lies on a token's way that rounds otherwise then.
    for name, disabled in [*((name, "") for name in _native.instruction_sets()), ("scalar", numpy_features())]:
        result = subprocess.run(
            [sys.executable, "-c", script, str(model_folder(MODELS["mistral"]))],
            env={**os.environ, "TSQP_SHM_ISA": name, "NPY_DISABLE_CPU_FEATURES": disabled},
            capture_output=True,
            text=True,
            check=True,
        )
        active, digest = result.stdout.split()
        assert active == name
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.parametrize("doorbell", ["adaptive", "zmq"])
def test_a_tcp_endpoint_serves_as_well(fast, doorbell):
    endpoint = free_tcp_endpoint()
    folder = model_folder(MODELS["llama"])
    options = {"doorbell": doorbell, "endpoint": endpoint}
    expected = greedy_of_transformers(folder, [PROMPTS[5]], MAX_TOKENS)
    with fast.llm(folder, dtype="float32", max_model_len=160, **options) as llm:
        assert token_ids(llm.generate(PROMPTS[5], GREEDY)) == expected
        # Every user of the machine can connect as well; who comes second is not heard.
        with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as stranger:
            stranger.sendall(os.urandom(64 * 100))
            assert token_ids(llm.generate(PROMPTS[5], GREEDY)) == expected
