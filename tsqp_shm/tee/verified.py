"""Mode `verified`: the GPU process multiplies integers, and every product is checked; it hides nothing."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tsqp_shm import _native
from tsqp_shm.errors import ModelFileError
from tsqp_shm.model.digest import LinearsDigest, ModelDigest
from tsqp_shm.model.field_weights import FIELD, load_field_linear, require_finite
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.modes import MODES
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.attention.private import PrivateAttention, private_caches
from tsqp_shm.tee.embedding import PrivateEmbedding
from tsqp_shm.tee.engine import Engine, Ports
from tsqp_shm.tee.linears import CheckedLinears
from tsqp_shm.tee.linears.field import FieldLinears
from tsqp_shm.tee.loaded import Loaded
from tsqp_shm.tee.norms import NormWeights
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue
from tsqp_shm.tee.transcript import Transcript

# Of each Linear. A false product passes with one over the field's size to this power.
NUM_VECTORS = MODES["verified"].num_vectors


class Verified(Loaded):
    """What the TEE process keeps for a session: norms, embedding, what checks products, keys and values.

    Attributes:
        linears_digest: of the Linears as integers, which both sides compute.
        weights: of each Linear, at its index, where this process multiplies too; else none are here.
        is_blinded: whether no row crosses that no pad was taken from, and pads are made here, of the weights.
    """

    is_blinded = False

    def __init__(
        self,
        network: Network,
        checkpoint: Checkpoint,
        digest: ModelDigest | None = None,
        transcript: Transcript | None = None,
    ) -> None:
        """Args:
        digest: takes all that is loaded; None: nobody asks for it.
        transcript: takes every product; None: nobody asks for them.

        Raises:
        ModelFileError: a tensor is missing or has another shape.
        UnsupportedModel: a Linear has more inputs than a product can sum, or a weight is no finite number.
        """
        self._network = network
        self._folder = checkpoint.folder
        self._transcript = transcript
        embedding = network.embedding
        self._norms = NormWeights.load(network, checkpoint)
        self._embedding = require_finite(checkpoint.tensor(embedding.weight, (embedding.rows, embedding.size)))
        if digest is not None:
            digest.add_embedding(self._embedding)
            self._norms.add_to(digest, network)
        linears = _load(network, checkpoint)
        self.weights = tuple(linears) if self.is_blinded else ()
        self._drawn: _Drawn | None = _draw(
            network,
            self.weights or linears,
            LinearsDigest() if digest is None else digest.linears,
            is_blinded=self.is_blinded,
        )
        self.linears_digest = self._drawn.linears_digest
        self._check_bytes = sum(check.num_bytes for check in self._drawn.checks)
        # Of all connections of the session: another GPU process finds them as they are.
        self._caches: list[_native.KeyValueCache] = []

    def describe(self) -> dict[str, Any]:
        """What checks products: how many vectors each Linear has, and the memory of all that is kept for it."""
        return {"checks": {"vectors": NUM_VECTORS, "bytes": self._check_bytes, "has_weights": bool(self.weights)}}

    def make_engine(self, slots: Slots, queue: SubmissionQueue, statistics: Statistics) -> Engine:
        """As `Loaded.make_engine`.

        Raises:
            ModelFileError: the model's files have changed since the session began.
        """
        network, plan = self._network, slots.plan
        self._caches = self._caches or private_caches(network, plan)
        ops = Operations(network, self._norms, slots, statistics)
        linears = self._linears(FieldLinears(plan, self._take_checks(), queue, ops, self._transcript), queue, ops)
        ports = Ports(
            embedding=PrivateEmbedding(self._embedding, ops),
            attention=PrivateAttention(plan, linears, ops, self._caches),
            linears=linears,
            wait=queue.wait,
            begin=linears.begin,
            check_arrived=linears.check_arrived,
            lack_pads=linears.lack_pads,
            keeps_caches=True,
            # Attention takes as long as all else of a layer here.
            staggers_blocks=True,
        )
        return Engine(network, plan, ops, ports)

    def _linears(self, of_gpu: FieldLinears, queue: SubmissionQueue, ops: Operations) -> CheckedLinears:
        """The port of an engine, which leads to `of_gpu`."""
        return of_gpu

    def _take_checks(self) -> tuple[_native.FieldCheck, ...]:
        """Each GPU process is checked by vectors of its own, and another by others. Weights that are not kept are read
        again."""
        drawn, self._drawn = self._drawn, None
        if drawn is None and self.weights:
            return _draw_checks(self._network, self.weights, is_blinded=self.is_blinded)
        if drawn is None:
            with Checkpoint.open(self._folder) as checkpoint:
                drawn = _draw(self._network, _load(self._network, checkpoint), LinearsDigest())
            if drawn.linears_digest != self.linears_digest:
                raise ModelFileError(self._folder, "its weights have changed since the session began")
        return drawn.checks


class _Drawn(NamedTuple):
    checks: tuple[_native.FieldCheck, ...]
    linears_digest: str


def _load(network: Network, checkpoint: Checkpoint) -> Iterator[_native.FieldLinear]:
    """Each Linear's weights, one at a time."""
    return (load_field_linear(checkpoint, linear) for linear in network.linears)


def _draw(
    network: Network, weights: Iterable[_native.FieldLinear], digest: LinearsDigest, *, is_blinded: bool = False
) -> _Drawn:
    """Checks, and the digest of what they are of, one Linear's weights after the other."""

    def hashed() -> Iterator[_native.FieldLinear]:
        for linear, loaded in zip(network.linears, weights, strict=True):
            digest.add(linear, loaded)
            yield loaded

    return _Drawn(_draw_checks(network, hashed(), is_blinded=is_blinded), digest.value)


def _draw_checks(
    network: Network, weights: Iterable[_native.FieldLinear], *, is_blinded: bool
) -> tuple[_native.FieldCheck, ...]:
    """Vectors for each Linear and what they give with its weights."""
    return tuple(
        _native.FieldCheck(loaded, _secret_vectors(linear.outputs), is_blinded)
        for linear, loaded in zip(network.linears, weights, strict=True)
    )


def _secret_vectors(size: int) -> npt.NDArray[np.uint32]:
    """Uniform elements of the field, by the system's generator. Shapes: [vectors, size] u32."""
    vectors = _secret_words(NUM_VECTORS * size)
    # Of 31 bits, one word in two thousand million is none of the field's, and is drawn again.
    while (strangers := np.flatnonzero(vectors >= FIELD)).size:
        vectors[strangers] = _secret_words(strangers.size)
    return vectors.reshape(NUM_VECTORS, size)


def _secret_words(count: int) -> npt.NDArray[np.uint32]:
    return np.ndarray(count, np.uint32, secrets.token_bytes(4 * count)) & np.uint32(FIELD)
