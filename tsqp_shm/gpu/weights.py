"""The weights of every Linear and of the embedding, on the device, fused once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tsqp_shm.model.network import Linear, Network
from tsqp_shm.model.weights import Checkpoint, Tensor


@dataclass(frozen=True)
class LinearWeights:
    """y = x W^T + b. Shapes: weight [N, K], bias [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Shapes: x [T, K]; out [T, N], written in place. Numerics: f32 accumulator, rounded once to out's dtype."""
        x = x.to(self.weight.dtype)
        if out.dtype != self.weight.dtype:
            # CUDA alone has a product with sums of another dtype.
            if out.device.type == "cuda":
                torch.mm(x, self.weight.t(), out_dtype=out.dtype, out=out)
            else:
                out.copy_(torch.mm(x, self.weight.t()))
            if self.bias is not None:
                out += self.bias
        elif self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def giving(self, dtype: torch.dtype) -> LinearWeights:
        """What can be applied to an output of that dtype: itself, or a copy whose weight has it."""
        if dtype == self.weight.dtype or self.weight.device.type == "cuda":
            return self
        return LinearWeights(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def split(self, rows: int) -> tuple[LinearWeights, LinearWeights]:
        """The first rows of the output and the others, over the same memory."""
        above, below = slice(None, rows), slice(rows, None)
        first, second = (None, None) if self.bias is None else (self.bias[above], self.bias[below])
        return LinearWeights(self.weight[above], first), LinearWeights(self.weight[below], second)


@dataclass(frozen=True)
class Weights:
    """Attributes:
    linears: by their index, to be taken once; each is loaded when its turn comes, so that who lays it out anew holds it
        twice, and not the whole model.
    """

    embedding: torch.Tensor
    linears: Iterator[LinearWeights]


def weights_size_bytes(network: Network, dtype: torch.dtype) -> int:
    """Device memory that `load_weights` takes, biases left aside."""
    return network.parameters * dtype.itemsize


def load_weights(
    network: Network,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:
    """Reads the checkpoint to the device.

    Args:
        checkpoint: must stay open until all Linears are taken.
        progress: called with (layers done, layers) as they are taken.

    Raises:
        ModelFileError: a tensor is missing, has another shape, or its file was truncated.
    """

    def load(name: str, *shape: int) -> torch.Tensor:
        return _to_torch(checkpoint.tensor(name, shape)).to(device=device, dtype=dtype)

    def load_linear(linear: Linear) -> LinearWeights:
        weights = [load(part.weight, part.rows, linear.inputs) for part in linear.parts]
        biases = [load(part.bias, part.rows) for part in linear.parts if part.bias is not None]
        return LinearWeights(_joined(weights), _joined(biases) if biases else None)

    def load_linears() -> Iterator[LinearWeights]:
        for done, layer in enumerate(network.layers, 1):
            for linear in layer.linears:
                yield load_linear(linear)
            progress(done, network.num_layers)
        yield LinearWeights(embedding, None) if network.is_tied else load_linear(network.lm_head)

    embedding = load(network.embedding.weight, network.embedding.rows, network.embedding.size)
    return Weights(embedding, load_linears())


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One below the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _to_torch(tensor: Tensor) -> torch.Tensor:
    source = torch.from_numpy(tensor.data)
    return source.view(torch.bfloat16) if tensor.dtype == "BF16" else source
