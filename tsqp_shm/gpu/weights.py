"""The weights of every Linear and of the embedding, on the device, fused once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint, Tensor


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b. Shapes: weight [N, K], bias [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Shapes: x [T, K]; out [T, N], written in place. Numerics: f32 accumulator, rounds once."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)


@dataclass(frozen=True)
class LayerWeights:
    """One layer. q and k are one Linear, gate and up are one; v goes elsewhere than q and k, so it is its own."""

    qk: Linear
    v: Linear
    o: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """Attributes:
    layers: to be taken once; each is loaded when its turn comes, so that who lays it out anew holds it twice, and not
        the whole model.
    """

    embedding: torch.Tensor
    lm_head: Linear
    layers: Iterator[LayerWeights]


def weights_size_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Device memory that `load_weights` takes, biases left aside."""
    embeddings = (1 if spec.tie_word_embeddings else 2) * spec.vocab_size * spec.hidden_size
    return (spec.num_layers * spec.layer_parameters + embeddings) * dtype.itemsize


def load_weights(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:
    """Reads the checkpoint from its mapping straight to the device.

    Args:
        checkpoint: must stay open until all layers are taken.
        progress: called with (layers done, layers) as they are taken.

    Raises:
        ModelFileError: a tensor is missing or has another shape.
    """
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def load(name: str, *shape: int) -> torch.Tensor:
        return _to_torch(checkpoint.tensor(name, shape)).to(device=device, dtype=dtype, copy=True)

    def linear(prefix: str, parts: dict[str, int], columns: int, *, has_bias: bool) -> Linear:
        weight = torch.cat([load(f"{prefix}.{part}.weight", rows, columns) for part, rows in parts.items()])
        bias = None
        if has_bias:
            bias = torch.cat([load(f"{prefix}.{part}.bias", rows) for part, rows in parts.items()])
        return Linear(weight, bias)

    def load_layer(layer: int) -> LayerWeights:
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        qkv_bias, mlp_bias = spec.qkv_bias, spec.mlp_bias
        return LayerWeights(
            qk=linear(attention, {"q_proj": q_rows, "k_proj": kv_rows}, hidden, has_bias=qkv_bias),
            v=linear(attention, {"v_proj": kv_rows}, hidden, has_bias=qkv_bias),
            o=linear(attention, {"o_proj": hidden}, q_rows, has_bias=spec.o_bias),
            gate_up=linear(mlp, {"gate_proj": intermediate, "up_proj": intermediate}, hidden, has_bias=mlp_bias),
            down=linear(mlp, {"down_proj": hidden}, intermediate, has_bias=mlp_bias),
        )

    def load_layers() -> Iterator[LayerWeights]:
        for layer in range(spec.num_layers):
            yield load_layer(layer)
            progress(layer + 1, spec.num_layers)

    embedding = load("model.embed_tokens.weight", spec.vocab_size, hidden)
    lm_head = embedding if spec.tie_word_embeddings else load("lm_head.weight", spec.vocab_size, hidden)
    return Weights(embedding, Linear(lm_head, None), load_layers())


def _to_torch(tensor: Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        # The mapping is read-only, which torch warns about; it is only ever copied from.
        warnings.simplefilter("ignore", UserWarning)
        source = torch.from_numpy(tensor.data)
    return source.view(torch.bfloat16) if tensor.dtype == "BF16" else source
