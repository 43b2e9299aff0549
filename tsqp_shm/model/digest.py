"""The digest of a model: one SHA-256 over all that decides what a mode with int8 weights says, however their files are
cut. `plain` computes with the weights as they are stored, which this covers as far as they are quantised.

Anybody can compute it by himself: it is the hash of one stream of bytes,

    stream  = "tsqp-shm model digest 1\\n", then records
    record  = "file NAME SIZE\\n", then the bytes of that file of the folder
            | "none NAME\\n"                                       a file that the folder does not have
            | "tensor NAME DTYPE SHAPE\\n", then its elements      SHAPE as 576x1536; little-endian, row-major, dense

in this order: the files of `FILES`; the embedding; of each layer attention norm, q|k|v, o, mlp norm, gate|up, down; the
final norm; lm_head. Embedding and norms are float32, whatever the checkpoint stores. Each part of a Linear, by the name
of its weight, is NAME int8 [rows, inputs], then NAME.scales float32 [rows], then its bias float32 [rows] where it has
one: weights as the modes compute with them (`model/field_weights.py`). An lm_head that is tied comes all the same, by
the embedding's name. Names are those of `model/network.py`, whatever prefix the checkpoint gives them.

generation_config.json is in it: it says which tokens end an answer, and how a request that says nothing is sampled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tsqp_shm import _native
from tsqp_shm.model.field_weights import load_field_linear
from tsqp_shm.model.files import MAX_TOKENIZER_BYTES, is_there, read_file
from tsqp_shm.model.network import Embedding, Linear, Network, Norm
from tsqp_shm.model.weights import Checkpoint

# What is read of a folder beside its weights, in the order of the stream.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_HEAD = b"tsqp-shm model digest 1\n"
# Of an embedding, so that a whole one never lies here in float32.
_ROWS_AT_ONCE = 4096


def model_digest(
    folder: Path,
    network: Network,
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Reads everything once, and quantises every Linear.

    Args:
        progress: called with (weights done, weights).

    Raises:
        ModelFileError: a file or tensor is missing or malformed.
        UnsupportedModel: a Linear has more inputs than a product can sum, or a weight that is no finite number.
    """
    stream = ModelDigest()
    for name in FILES:
        stream.add_file(name, read_file(folder / name, MAX_TOKENIZER_BYTES) if is_there(folder / name) else None)
    done = 0
    # The embedding is read once more where it is lm_head too.
    total = network.embedding.rows * network.embedding.size + sum(linear.parameters for linear in network.linears)

    def add_norm(norm: Norm) -> None:
        stream.add_tensor(norm.weight, checkpoint.tensor(norm.weight, (norm.size,)).to_float32())

    def add_linears(*linears: Linear) -> None:
        nonlocal done
        for linear in linears:
            stream.add_linear(linear, load_field_linear(checkpoint, linear), checkpoint)
            done += linear.parameters
            progress(done, total)

    _add_embedding(stream, network.embedding, checkpoint)
    done += network.embedding.rows * network.embedding.size
    progress(done, total)
    for layer in network.layers:
        add_norm(layer.attention_norm)
        add_linears(layer.attention.qkv, layer.attention.o)
        add_norm(layer.mlp_norm)
        add_linears(layer.mlp.gate_up, layer.mlp.down)
    add_norm(network.final_norm)
    add_linears(network.lm_head)
    return stream.value


class ModelDigest:
    """The stream of one model, as far as it has come."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(_HEAD)

    @property
    def value(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def add_file(self, name: str, content: bytes | None) -> None:
        if content is None:
            self._hash.update(f"none {name}\n".encode())
        else:
            self._hash.update(f"file {name} {len(content)}\n".encode() + content)

    def add_tensor(self, name: str, elements: NDArray[np.float32] | NDArray[np.int8]) -> None:
        self.begin_tensor(name, elements.dtype, elements.shape)
        self.add_elements(elements)

    def begin_tensor(self, name: str, dtype: np.dtype[np.float32] | np.dtype[np.int8], shape: tuple[int, ...]) -> None:
        """Its elements follow by `add_elements`, in as many pieces as it pleases."""
        self._hash.update(f"tensor {name} {dtype.name} {'x'.join(map(str, shape))}\n".encode())

    def add_elements(self, elements: NDArray[np.float32] | NDArray[np.int8]) -> None:
        # Of a big-endian machine the bytes are turned here.
        little = np.ascontiguousarray(elements, elements.dtype.newbyteorder("<"))
        self._hash.update(little.data)

    def add_linear(self, linear: Linear, loaded: _native.FieldLinear, checkpoint: Checkpoint) -> None:
        """Its parts, one behind the other.

        Args:
            loaded: the same Linear, quantised.
            checkpoint: for its biases.
        """
        scales, first = loaded.scales, 0
        for part in linear.parts:
            self.add_tensor(part.weight, loaded.quantised(first, part.rows))
            self.add_tensor(f"{part.weight}.scales", scales[first : first + part.rows])
            if part.bias is not None:
                self.add_tensor(part.bias, checkpoint.tensor(part.bias, (part.rows,)).to_float32())
            first += part.rows


def _add_embedding(stream: ModelDigest, embedding: Embedding, checkpoint: Checkpoint) -> None:
    shape = embedding.rows, embedding.size
    table = checkpoint.tensor(embedding.weight, shape)
    stream.begin_tensor(embedding.weight, np.dtype(np.float32), shape)
    for first in range(0, embedding.rows, _ROWS_AT_ONCE):
        stream.add_elements(replace(table, data=table.data[first : first + _ROWS_AT_ONCE]).to_float32())
