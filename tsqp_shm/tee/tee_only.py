"""Mode `tee-only`: the whole model in this process; nothing crosses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from tsqp_shm import _native
from tsqp_shm.model.digest import ModelDigest
from tsqp_shm.model.field_weights import load_field_linear, require_finite
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint, Tensor
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.attention.private import PrivateAttention, private_caches
from tsqp_shm.tee.embedding import PrivateEmbedding
from tsqp_shm.tee.engine import Engine, MakeEngineAlone, Ports
from tsqp_shm.tee.linears.local import LocalLinears
from tsqp_shm.tee.norms import NormWeights
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.statistics import Statistics


class _Weights(NamedTuple):
    norms: NormWeights
    embedding: Tensor
    linears: tuple[_native.FieldLinear, ...]


def load_tee_only(network: Network, checkpoint: Checkpoint, digest: ModelDigest | None = None) -> MakeEngineAlone:
    """Of the weights, this mode wants all: the embedding as it is, norms and biases in float32, Linears in int8.

    Args:
        digest: takes all of it as it was loaded; None: nobody asks for it.

    Raises:
        ModelFileError: a tensor is missing or has another shape.
        UnsupportedModel: a Linear has more inputs than a product can sum, or a weight is no finite number.
    """
    embedding = network.embedding
    table = require_finite(checkpoint.tensor(embedding.weight, (embedding.rows, embedding.size)))
    norms = NormWeights.load(network, checkpoint)
    if digest is not None:
        digest.add_embedding(table)
        norms.add_to(digest, network)
    linears = []
    for linear in network.linears:
        linears.append(load_field_linear(checkpoint, linear))
        if digest is not None:
            digest.linears.add(linear, linears[-1])
    return partial(_tee_only_engine, network, _Weights(norms, table, tuple(linears)))


def _tee_only_engine(
    network: Network, weights: _Weights, slots: Slots, look: Callable[[], None], statistics: Statistics
) -> Engine:
    """An engine whose ports lead nowhere but to this process's kernels."""
    ops = Operations(network, weights.norms, slots, statistics)
    linears = LocalLinears(weights.linears, ops, look)
    ports = Ports(
        embedding=PrivateEmbedding(weights.embedding, ops),
        attention=PrivateAttention(slots.plan, linears, ops, private_caches(network, slots.plan)),
        linears=linears,
        wait=_nothing_is_in_flight,
        begin=lambda verification, step: None,
    )
    return Engine(network, slots.plan, ops, ports)


def _nothing_is_in_flight(sequence: int) -> None:
    raise AssertionError(f"nobody was asked for anything, and {sequence} is waited for")
