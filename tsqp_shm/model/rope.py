"""The rotary embedding: its parameters in a config.json, and the tables of cosines and sines they give.

NOTE(numerics): no transcendental function of numpy's or the C library's is used, whose last bits depend on the
processor: the tables are the same on every machine (`native/elementary/`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tsqp_shm import _native
from tsqp_shm.errors import UnsupportedModel
from tsqp_shm.model.json_fields import JsonFields, brief

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
# In radians a position, where 1 is usual.
_MAX_FREQUENCY = 1e6


@dataclass(frozen=True)
class RopeSpec:
    """Which rotary embedding a model uses; fields that the kind does not use keep their defaults.

    Attributes:
        kind: one of `ROPE_KINDS`.
        factor: stretch of the context (linear, llama3, yarn).
        attention_factor: multiplies cos and sin (yarn); None: derived from factor, mscale, mscale_all_dim.
        truncate: whether yarn rounds its correction range to whole dimensions.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_fields(cls, config: JsonFields, max_position_embeddings: int) -> RopeSpec:
        """Reads the rotary parameters in either form: `rope_theta` with `rope_scaling`, or `rope_parameters`.

        Source: transformers `RotaryEmbeddingConfigMixin`: `convert_rope_params_to_dict` and
            `standardize_rope_params`, whose order of precedence this is.
        """
        rope = config.nested("rope_scaling") or config.nested("rope_parameters") or JsonFields({})
        for fields in (rope, config):
            if fields.raw("partial_rotary_factor") not in (None, 1):
                value = brief(fields.raw("partial_rotary_factor"))
                raise UnsupportedModel(fields.path("partial_rotary_factor"), value, "1: the whole head is rotated")
        kind_name = "rope_type" if "rope_type" in rope else "type"
        kind = rope.raw(kind_name, "default")
        if kind not in ROPE_KINDS:
            raise UnsupportedModel(rope.path(kind_name), brief(kind), ", ".join(ROPE_KINDS))
        for layer_type in ("full_attention", "sliding_attention"):
            if layer_type in rope:
                raise UnsupportedModel(rope.path(layer_type), "an object", "one set of parameters for all layers")

        theta = (rope if "rope_theta" in rope else config).number("rope_theta", 10_000.0, above=1.0)
        if kind == "default":
            return cls(theta=theta)
        if kind == "linear":
            return cls("linear", theta, factor=rope.number("factor"))

        # Phi-3 put this field beside the others, and transformers lets it win for every family.
        name = "original_max_position_embeddings"
        original = (config if name in config else rope).count(name, max_position_embeddings)
        if kind == "llama3":
            low = rope.number("low_freq_factor")
            return cls(
                "llama3",
                theta,
                factor=rope.number("factor"),
                original_max_position_embeddings=original,
                low_freq_factor=low,
                high_freq_factor=rope.number("high_freq_factor", above=low),
            )
        factor = rope.optional_number("factor") if "factor" in rope else rope.number("factor")
        return cls(
            "yarn",
            theta,
            factor=factor or max_position_embeddings / original,
            original_max_position_embeddings=original,
            beta_fast=rope.optional_number("beta_fast") or 32.0,
            beta_slow=rope.optional_number("beta_slow") or 1.0,
            attention_factor=rope.optional_number("attention_factor"),
            mscale=rope.optional_number("mscale"),
            mscale_all_dim=rope.optional_number("mscale_all_dim"),
            truncate=rope.flag("truncate", True),
        )

    def reach(self, max_position_embeddings: int) -> int:
        """The positions to which it is stretched. A config of llama3 states them as the model's own, one of yarn so or
        by the factor, one of linear by the factor alone."""
        stretched = {"linear": max_position_embeddings, "yarn": self.original_max_position_embeddings}
        reach = self.factor * stretched[self.kind] if self.kind in stretched else max_position_embeddings
        return int(min(reach, 2**31 - 1))


def rope_tables(rope: RopeSpec, head_dim: int, num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the cosines and sines of every position.

    Shapes: cos, sin [num_positions, head_dim / 2] f32; row-major, dense.
    Numerics: inverse frequencies and angles round to f32 as they do in transformers, because at position 8192
        an angle that was not rounded differs by 5e-4; cos and sin of that angle are rounded once, within
        0.5001 ULP of exact. yarn's attention factor is multiplied in.
    Source: transformers `modeling_rope_utils.py` and `LlamaRotaryEmbedding.forward`.
    """
    return _native.rope_tables(inverse_frequencies(rope, head_dim), num_positions, _attention_factor(rope))


def require_finite(rope: RopeSpec, head_dim: int) -> None:
    """Raises:
    UnsupportedModel: the parameters are so far from any real ones that the tables would not be finite.
    """
    try:
        with np.errstate(all="ignore"):
            extreme = max(float(np.abs(inverse_frequencies(rope, head_dim)).max()), abs(_attention_factor(rope)))
    except (ArithmeticError, ValueError):
        extreme = math.inf
    if not extreme < _MAX_FREQUENCY:
        raise UnsupportedModel("rope_parameters", f"angles of {extreme:g}", "parameters that give finite tables")


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> NDArray[np.float32]:
    """Returns the angle per position of each pair of dimensions.

    Shapes: [head_dim / 2] f32.
    Numerics: powers of theta are rounded to f32 once; within 2 ULP of transformers on a CPU, whose `pow` is not.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.array([_native.power(rope.theta, float(exponent)) for exponent in exponents], np.float32)
    inv_freq = np.float32(1) / wavelengths
    if rope.kind == "linear":
        return inv_freq / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq)
    if rope.kind == "yarn":
        return _yarn(rope, wavelengths)
    return inv_freq


def _llama3(rope: RopeSpec, inv_freq: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divides the low frequencies by the factor, keeps the high ones and blends between."""
    factor, low, high = np.float32(rope.factor), rope.low_freq_factor, rope.high_freq_factor
    context = rope.original_max_position_embeddings
    wavelengths = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelengths > np.float32(context / low), inv_freq / factor, blended)
    return np.where(wavelengths < np.float32(context / high), inv_freq, scaled).astype(np.float32)


def _yarn(rope: RopeSpec, wavelengths: NDArray[np.float32]) -> NDArray[np.float32]:
    """Interpolates the low frequencies, extrapolates the high ones, with a linear ramp between.

    Source: YaRN (arXiv 2309.00071), section 3.2, with the dimension range of transformers.
    """
    half_dim = len(wavelengths)
    low = _dimension_with_rotations(rope, rope.beta_fast, 2 * half_dim)
    high = _dimension_with_rotations(rope, rope.beta_slow, 2 * half_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half_dim - 1)
    if low == high:
        high += 0.001

    ramp = (np.arange(half_dim, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    extrapolated = 1 - np.clip(ramp, 0, 1)
    interpolation = np.float32(1) / (np.float32(rope.factor) * wavelengths)
    inv_freq: NDArray[np.float32] = interpolation * (1 - extrapolated) + extrapolated / wavelengths
    return inv_freq


def _dimension_with_rotations(rope: RopeSpec, rotations: float, head_dim: int) -> float:
    """Returns the dimension that turns this many times over the original context."""
    turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
    return head_dim * _native.logarithm(turns) / (2 * _native.logarithm(rope.theta))


def _attention_factor(rope: RopeSpec) -> float:
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * _native.logarithm(factor) + 1.0
