"""The digest of a model: one SHA-256 over all that decides what a mode with int8 weights says, however their files are
cut. `plain` computes with the weights as they are stored, which this covers as far as they are quantised.

Anybody can compute it by himself: it is the hash of one stream of bytes,

    stream  = "tsqp-shm model digest 2\\n", then records
    record  = "file NAME sha256:HEX\\n"                            the hash of that file of the folder
            | "none NAME\\n"                                       a file that the folder does not have
            | "tensor NAME DTYPE SHAPE\\n", then its elements      SHAPE as 576x1536; little-endian, row-major, dense
            | "linears sha256:HEX\\n"                              the digest of the quantised Linears

in this order: the files of `FILES`; the embedding; of each layer attention norm and mlp norm; the final norm; the
Linears. Embedding and norms are float32, whatever the checkpoint stores.

The digest of the Linears is the hash of a stream of its own, which whoever has nothing but the weights computes too,

    stream  = "tsqp-shm linears digest 1\\n", then records "tensor ...", as above

in the order of the network: of each layer q|k|v, o, gate|up, down; lm_head. Each part of a Linear, by the name of its
weight, is NAME int8 [rows, inputs], then NAME.scales float32 [rows], then its bias float32 [rows] where it has one:
weights as the modes compute with them (`model/field_weights.py`). An lm_head that is tied comes all the same, by the
embedding's name. Names are those of `model/network.py`, whatever prefix the checkpoint gives them.

generation_config.json is in it: it says which tokens end an answer, and how a request that says nothing is sampled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tsqp_shm import _native
from tsqp_shm.model.field_weights import load_field_linear
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.network import Linear, Network, Norm
from tsqp_shm.model.weights import Checkpoint, Tensor

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
_MODEL_HEAD = "tsqp-shm model digest 2"
_LINEARS_HEAD = "tsqp-shm linears digest 1"
# Of an embedding, so that a whole one never lies here in float32.
_ROWS_AT_ONCE = 4096
_Elements = NDArray[np.float32] | NDArray[np.int8]


class Digests(NamedTuple):
    """Both as "sha256:HEX"."""

    model: str
    linears: str


def model_digest(
    files: ModelFiles,
    network: Network,
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Digests:
    """Reads everything once, and quantises every Linear.

    Args:
        progress: called with (weights done, weights).

    Raises:
        ModelFileError: a file or tensor is missing or malformed.
        UnsupportedModel: a Linear has more inputs than a product can sum, or a weight that is no finite number.
    """
    embedding = network.embedding
    # It is read once more where it is lm_head too.
    done = embedding.rows * embedding.size
    total = done + sum(linear.parameters for linear in network.linears)
    digest = ModelDigest(files)
    digest.add_embedding(checkpoint.tensor(embedding.weight, (embedding.rows, embedding.size)))
    progress(done, total)
    for norm in network.norms:
        digest.add_norm(norm, checkpoint.tensor(norm.weight, (norm.size,)).to_float32())
    for linear in network.linears:
        digest.linears.add(linear, load_field_linear(checkpoint, linear))
        done += linear.parameters
        progress(done, total)
    return digest.finish()


class _Stream:
    """What is hashed, as far as it has come."""

    def __init__(self, head: str) -> None:
        self._hash = hashlib.sha256()
        self.add_line(head)

    @property
    def value(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def add_line(self, line: str) -> None:
        self._hash.update(f"{line}\n".encode())

    def add_tensor(self, name: str, elements: _Elements) -> None:
        self.begin_tensor(name, elements.dtype.name, elements.shape)
        self.add_elements(elements)

    def begin_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Its elements follow by `add_elements`, in as many pieces as it pleases."""
        self.add_line(f"tensor {name} {dtype} {'x'.join(map(str, shape))}")

    def add_elements(self, elements: _Elements) -> None:
        # Of a big-endian machine the bytes are turned here.
        self._hash.update(np.ascontiguousarray(elements, elements.dtype.newbyteorder("<")).data)


class LinearsDigest:
    """Of the quantised Linears alone; whoever loads them has each hashed while it is at hand."""

    def __init__(self) -> None:
        self._stream = _Stream(_LINEARS_HEAD)
        self._count = 0

    @property
    def value(self) -> str:
        """Of all of a network's, when all were added."""
        return self._stream.value

    def add(self, linear: Linear, loaded: _native.FieldLinear) -> None:
        """Its parts, one behind the other.

        Args:
            linear: the next of `network.linears`.
            loaded: the same one, quantised, its bias included: no file is read for this.
        """
        assert linear.index == self._count, "each in the order of the network"
        self._count += 1
        scales, bias, first = loaded.scales, loaded.bias, 0
        for part in linear.parts:
            of_part = slice(first, first + part.rows)
            self._stream.add_tensor(part.weight, loaded.quantised(first, part.rows))
            self._stream.add_tensor(f"{part.weight}.scales", scales[of_part])
            if part.bias is not None:
                assert bias is not None
                self._stream.add_tensor(part.bias, bias[of_part])
            first += part.rows


class ModelDigest:
    """Of a whole model; whoever loads it adds what it has loaded: the embedding, then the norms, and its Linears.

    Attributes:
        linears: takes the Linears.
    """

    def __init__(self, files: ModelFiles) -> None:
        """Raises:
        ModelFileError: a file cannot be read, or is another one than was read before.
        """
        self._stream = _Stream(_MODEL_HEAD)
        self.linears = LinearsDigest()
        for name in FILES:
            digest = files.digest(name)
            self._stream.add_line(f"none {name}" if digest is None else f"file {name} sha256:{digest}")

    def add_embedding(self, table: Tensor) -> None:
        self._stream.begin_tensor(table.name, "float32", table.data.shape)
        for first in range(0, len(table.data), _ROWS_AT_ONCE):
            self._stream.add_elements(replace(table, data=table.data[first : first + _ROWS_AT_ONCE]).to_float32())

    def add_norm(self, norm: Norm, weight: NDArray[np.float32]) -> None:
        """The next of `network.norms`."""
        self._stream.add_tensor(norm.weight, weight)

    def finish(self) -> Digests:
        """Of the model and of its Linears, when all was added; once."""
        linears = self.linears.value
        self._stream.add_line(f"linears {linears}")
        return Digests(self._stream.value, linears)
