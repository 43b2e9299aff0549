"""What makes the engine of each mode: its ports, and what leads through them. Names are those of `tsqp_shm.modes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tsqp_shm.model.digest import ModelDigest
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.tee.engine import MakeEngine, MakeEngineAlone
from tsqp_shm.tee.plain import load_plain
from tsqp_shm.tee.tee_only import load_tee_only
from tsqp_shm.tee.verified import Verified


class Loaded(NamedTuple):
    """What a mode has taken of the weights, once a session: the checkpoint is closed afterwards.

    Attributes:
        linears_digest: of the Linears as integers, for the GPU process to compare; "" where it has no need of them.
    """

    make_engine: MakeEngine
    linears_digest: str = ""


def _load_plain(network: Network, checkpoint: Checkpoint, digest: ModelDigest | None) -> Loaded:
    assert digest is None, "it would be of weights that this mode does not load"
    return Loaded(load_plain(network, checkpoint))


def _load_verified(network: Network, checkpoint: Checkpoint, digest: ModelDigest | None) -> Loaded:
    verified = Verified(network, checkpoint, digest)
    return Loaded(verified.make_engine, verified.linears_digest)


# A digest, where somebody asks for one, takes what was loaded.
ENGINES: dict[str, Callable[[Network, Checkpoint, ModelDigest | None], Loaded]] = {
    "plain": _load_plain,
    "verified": _load_verified,
}
# Of modes without a GPU process.
ALONE_ENGINES: dict[str, Callable[[Network, Checkpoint, ModelDigest | None], MakeEngineAlone]] = {
    "tee-only": load_tee_only
}
