"""Hashes of what has to be the same on every processor. Imports neither torch nor transformers, so that a process for
each kind of processor starts at once."""

from __future__ import annotations

import hashlib

import numpy as np

from tsqp_shm import _native
from tsqp_shm.model.rope import RopeSpec, rope_tables

# Of released models, and one of each kind.
ROPES = {
    "smollm2": RopeSpec(theta=1e5),
    "qwen2": RopeSpec(theta=1e6),
    "linear": RopeSpec("linear", 1e4, factor=3.0),
    "llama3": RopeSpec("llama3", 5e5, factor=32.0, original_max_position_embeddings=8192),
    "yarn": RopeSpec("yarn", 1e6, factor=4.0, original_max_position_embeddings=32_768),
}


def digest_of_tables(rope: RopeSpec) -> str:
    cosines, sines = rope_tables(rope, 64, 4096)
    return hashlib.sha256(cosines.tobytes() + sines.tobytes()).hexdigest()


def digest_of_draws() -> str:
    """Of tokens drawn at temperature 1, and of their log probabilities, from rows that are whole numbers / 4096."""
    logits = np.random.default_rng(5).integers(-40_000, 40_000, (16, 5000)).astype(np.float32) / np.float32(4096)
    bits = hashlib.sha256()
    for settings in ({}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.01}):
        samplers = [
            _native.TokenSampler(5000, [], temperature=1.0, seed=7, stream=row, **settings) for row in range(16)
        ]
        drawn = _native.draw_tokens(logits, samplers)
        bits.update(drawn.tobytes())
        for found in _native.score_tokens(logits, drawn, 3):
            bits.update(found.tobytes())
    return bits.hexdigest()


def digest_of_run(model: str, mode: str) -> str:
    """Of the logits of a prompt, and of tokens drawn at temperature 1 after it and after a shorter one."""
    from tsqp_shm import LLM, SamplingParams

    ids = np.random.default_rng(3).integers(0, 257, 150).tolist()
    with LLM(model, mode=mode, max_model_len=256, max_batch_tokens=64, tee_threads=1) as llm:
        bits = hashlib.sha256(llm.logits(ids).tobytes())
        params = SamplingParams(max_tokens=24, temperature=1.0, seed=11, ignore_eos=True)
        for output in llm.generate([ids, ids[:9]], params, use_tqdm=False):
            bits.update(np.asarray(output.outputs[0].token_ids, np.int64).tobytes())
    return bits.hexdigest()


def numpy_features() -> list[str]:
    """What numpy would use of this processor, beside what it was built to need."""
    return np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])  # type: ignore[index, no-any-return]
