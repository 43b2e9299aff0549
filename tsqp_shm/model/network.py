"""The network of a model as data: which norms, Linears and attention follow on each other, and what the checkpoint
calls their weights.

Both sides take names and shapes from here, and the number of a Linear is its place in this order: of each layer qkv, o,
gate_up and down, and lm_head at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, groupby
from typing import Literal

from tsqp_shm.model.rope import RopeSpec
from tsqp_shm.model.spec import HEAD_WEIGHT, ModelSpec

# A tensor of the checkpoint.
TensorShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Norm:
    """RMSNorm. Shapes: weight [size]."""

    weight: str
    size: int
    eps: float

    def tensors(self) -> Iterator[TensorShape]:
        yield self.weight, (self.size,)


@dataclass(frozen=True)
class Part:
    """Rows of a Linear that are a Linear of their own in the checkpoint."""

    weight: str
    bias: str | None
    rows: int


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b. Shapes: x [T, inputs]; y [T, outputs].

    Attributes:
        index: place in the network's order.
        role: what it is in its layer; the plan knows by it which slots it may use.
        parts: one below the other; either all of them have a bias or none has.
    """

    index: int
    role: str
    inputs: int
    parts: tuple[Part, ...]

    @property
    def outputs(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def parameters(self) -> int:
        """Biases left aside."""
        return self.inputs * self.outputs

    def tensors(self) -> Iterator[TensorShape]:
        for part in self.parts:
            yield part.weight, (part.rows, self.inputs)
            if part.bias is not None:
                yield part.bias, (part.rows,)


@dataclass(frozen=True)
class Embedding:
    """Shapes: weight [rows, size]."""

    weight: str
    rows: int
    size: int

    def tensors(self) -> Iterator[TensorShape]:
        yield self.weight, (self.rows, self.size)


@dataclass(frozen=True)
class Attention:
    """Attributes:
    window: query i sees key j if and only if 0 <= i - j < window. None: it sees every earlier key.
    scale: of the scores.
    qkv: x [T, C] -> q [T, H*D], k and v [T, G*D], side by side.
    o: the heads' outputs [T, H*D] -> hidden [T, C].
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    scale: float
    rope: RopeSpec
    qkv: Linear
    o: Linear

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Mlp:
    """down(activation(gate) * up). gate_up: x [T, C] -> [T, 2F], gate before up; down: [T, F] -> hidden [T, C]."""

    activation: Literal["silu"]
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Layer:
    index: int
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down

    @property
    def norms(self) -> tuple[Norm, ...]:
        return self.attention_norm, self.mlp_norm

    def tensors(self) -> Iterator[TensorShape]:
        for norm in self.norms:
            yield from norm.tensors()
        for linear in self.linears:
            yield from linear.tensors()


@dataclass(frozen=True)
class Network:
    """Embedding, layers, final norm, lm_head. Its plain numbers are what `shm.plan.Plan.derive` takes."""

    embedding: Embedding
    layers: tuple[Layer, ...]
    final_norm: Norm
    lm_head: Linear

    @classmethod
    def of(cls, spec: ModelSpec) -> Network:
        embedding = Embedding(spec.embedding_weight, spec.vocab_size, spec.hidden_size)
        indices = count()
        layers = tuple(_layer(spec, layer, indices) for layer in range(spec.num_layers))
        head = embedding.weight if spec.tie_word_embeddings else HEAD_WEIGHT
        lm_head = Linear(next(indices), "lm_head", spec.hidden_size, (Part(head, None, spec.vocab_size),))
        return cls(embedding, layers, _norm(spec, "model.norm"), lm_head)

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Each at its index."""
        return (*(linear for layer in self.layers for linear in layer.linears), self.lm_head)

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        return (*(norm for layer in self.layers for norm in layer.norms), self.final_norm)

    @property
    def is_tied(self) -> bool:
        """Whether lm_head is the embedding once more."""
        return self.lm_head.parts[0].weight == self.embedding.weight

    @property
    def parameters(self) -> int:
        """Weights of the Linears and of the embedding, biases left aside."""
        embedding = 0 if self.is_tied else self.embedding.rows * self.embedding.size
        return embedding + sum(linear.parameters for linear in self.linears)

    @property
    def layer_parameters(self) -> int:
        """Weights of the largest layer's Linears, biases left aside."""
        return max(sum(linear.parameters for linear in layer.linears) for layer in self.layers)

    def tensors(self) -> Iterator[TensorShape]:
        """The name and shape of each tensor of the checkpoint, once."""
        yield from self.outer_tensors()
        for layer in self.layers:
            yield from layer.tensors()

    def outer_tensors(self) -> Iterator[TensorShape]:
        """Those that belong to no layer."""
        yield from self.embedding.tensors()
        yield from self.final_norm.tensors()
        if not self.is_tied:
            yield from self.lm_head.tensors()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return self.embedding.size

    @property
    def vocab_size(self) -> int:
        return self.embedding.rows

    @property
    def intermediate_size(self) -> int:
        return max(layer.mlp.down.inputs for layer in self.layers)

    @property
    def num_heads(self) -> int:
        return max(layer.attention.num_heads for layer in self.layers)

    @property
    def num_kv_heads(self) -> int:
        return max(layer.attention.num_kv_heads for layer in self.layers)

    @property
    def head_dim(self) -> int:
        return max(layer.attention.head_dim for layer in self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(layer.attention.window for layer in self.layers)

    @property
    def linear_roles(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """The roles of `linears`, by runs of layers that have the same; lm_head is a run of its own."""
        by_layer = [tuple(linear.role for linear in layer.linears) for layer in self.layers]
        runs = [(len(list(same)), roles) for roles, same in groupby(by_layer)]
        return (*runs, (1, (self.lm_head.role,)))


def _layer(spec: ModelSpec, index: int, indices: Iterator[int]) -> Layer:
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def linear(role: str, inputs: int, block: str, parts: dict[str, int], *, has_bias: bool) -> Linear:
        names = {f"model.layers.{index}.{block}.{part}": rows for part, rows in parts.items()}
        of_names = (Part(f"{name}.weight", f"{name}.bias" if has_bias else None, rows) for name, rows in names.items())
        return Linear(next(indices), role, inputs, tuple(of_names))

    return Layer(
        index=index,
        attention_norm=_norm(spec, f"model.layers.{index}.input_layernorm"),
        attention=Attention(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=spec.windows[index],
            scale=1.0 / math.sqrt(spec.head_dim),
            rope=spec.rope,
            qkv=linear(
                "qkv", hidden, "self_attn", {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width},
                has_bias=spec.qkv_bias,
            ),
            o=linear("o", q_width, "self_attn", {"o_proj": hidden}, has_bias=spec.o_bias),
        ),
        mlp_norm=_norm(spec, f"model.layers.{index}.post_attention_layernorm"),
        mlp=Mlp(
            activation="silu",
            gate_up=linear(
                "gate_up", hidden, "mlp", {"gate_proj": intermediate, "up_proj": intermediate}, has_bias=spec.mlp_bias
            ),
            down=linear("down", intermediate, "mlp", {"down_proj": hidden}, has_bias=spec.mlp_bias),
        ),
    )  # fmt: skip


def _norm(spec: ModelSpec, name: str) -> Norm:
    return Norm(f"{name}.weight", spec.hidden_size, spec.rms_norm_eps)
