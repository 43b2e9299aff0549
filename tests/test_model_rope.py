"""Rotary tables agree with transformers to the rounding of float32."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp_shm.model.rope import RopeSpec, inverse_frequencies, rope_tables
from tsqp_shm.model.spec import ModelSpec


def transformers_rope(head_dim, rope_parameters):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=8,
        intermediate_size=8,
        max_position_embeddings=131_072,
        rope_parameters=dict(rope_parameters),
    )
    return LlamaRotaryEmbedding(config), ModelSpec.from_config(config.to_dict()).rope


def assert_tables_agree(head_dim, rope_parameters, num_positions):
    import torch

    theirs, spec = transformers_rope(head_dim, rope_parameters)
    inv_freq = theirs.inv_freq.numpy()
    ours = inverse_frequencies(spec, head_dim)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, inv_freq, rtol=4e-7, atol=1e-38)

    cos, sin = theirs(torch.zeros(1), torch.arange(num_positions)[None])
    positions = np.arange(num_positions, dtype=np.float32)[:, None]
    # A last bit of an inverse frequency is worth this much of an angle.
    tolerance = (4e-7 * positions * inv_freq + 3e-7) * max(1.0, theirs.attention_scaling)
    half = head_dim // 2
    for table, expected in zip(rope_tables(spec, head_dim, num_positions), (cos, sin), strict=True):
        assert table.shape == (num_positions, half)
        assert table.dtype == np.float32
        assert table.flags.c_contiguous
        assert (np.abs(table - expected[0, :, :half].numpy()) <= tolerance).all()


thetas = st.sampled_from([1e4, 1e5, 5e5, 1e6, 1e9]) | st.floats(100, 1e7)
head_dims = st.sampled_from([4, 8, 20, 64, 80, 128, 256])
factors = st.sampled_from([1.0, 2.0, 4, 8.0, 32.0, 40]) | st.floats(1, 64)
contexts = st.sampled_from([256, 2048, 4096, 8192, 32768])
positions = st.sampled_from([1, 17, 300])


@settings(deadline=None, max_examples=60)
@given(head_dims, thetas, positions)
def test_default_tables_agree(head_dim, theta, num_positions):
    assert_tables_agree(head_dim, {"rope_type": "default", "rope_theta": theta}, num_positions)


@settings(deadline=None, max_examples=60)
@given(head_dims, thetas, factors, positions)
def test_linear_tables_agree(head_dim, theta, factor, num_positions):
    parameters = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    assert_tables_agree(head_dim, parameters, num_positions)


@settings(deadline=None, max_examples=100)
@given(head_dims, thetas, factors, contexts, st.floats(0.5, 4), st.floats(0.5, 8), positions)
def test_llama3_tables_agree(head_dim, theta, factor, context, low, gap, num_positions):
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + gap,
        "original_max_position_embeddings": context,
    }
    # The blend divides a difference by high - low: a last bit of a wavelength weighs 1 / gap as much there.
    theirs, spec = transformers_rope(head_dim, parameters)
    np.testing.assert_allclose(inverse_frequencies(spec, head_dim), theirs.inv_freq.numpy(), rtol=1e-4 / gap)


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 32.0), (128, 8.0)])
def test_llama3_tables_of_the_released_models_agree(head_dim, factor):
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert_tables_agree(head_dim, parameters, 4096)


optional_numbers = st.none() | st.floats(0.1, 4)


@settings(deadline=None, max_examples=150)
@given(
    head_dims,
    thetas,
    factors,
    contexts,
    st.fixed_dictionaries(
        {},
        optional={
            "beta_fast": st.none() | st.floats(8, 64),
            "beta_slow": st.none() | st.floats(0.5, 4),
            "attention_factor": optional_numbers,
            "mscale": optional_numbers,
            "mscale_all_dim": optional_numbers,
            "truncate": st.booleans(),
        },
    ),
    positions,
)
def test_yarn_tables_agree(head_dim, theta, factor, context, options, num_positions):
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": context,
        **options,
    }
    assert_tables_agree(head_dim, parameters, num_positions)


def test_tables_agree_far_into_a_long_context():
    assert_tables_agree(64, {"rope_type": "default", "rope_theta": 5e5}, 32_768)


def test_the_first_position_is_not_rotated():
    cos, sin = rope_tables(RopeSpec(), 8, 1)
    assert cos.tolist() == [[1.0] * 4]
    assert sin.tolist() == [[0.0] * 4]


def test_no_positions_give_empty_tables():
    cos, sin = rope_tables(RopeSpec(), 8, 0)
    assert cos.shape == sin.shape == (0, 4)
