"""What makes the engine of each mode: its ports, and what leads through them. Names are those of `tsqp_shm.modes`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tsqp_shm.model.digest import ModelDigest
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.tee.engine import MakeEngine, MakeEngineAlone
from tsqp_shm.tee.plain import load_plain
from tsqp_shm.tee.tee_only import load_tee_only
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.tee.verified import Verified


class Loaded(NamedTuple):
    """What a mode has taken of the weights, once a session: the checkpoint is closed afterwards.

    Attributes:
        linears_digest: of the Linears as integers, for the GPU process to compare; "" where it has no need of them.
        facts: what of it belongs to the bring-up report, as plain values.
    """

    make_engine: MakeEngine
    linears_digest: str = ""
    facts: Mapping[str, Any] = MappingProxyType({})


def _load_plain(
    network: Network, checkpoint: Checkpoint, digest: ModelDigest | None, transcript: Transcript | None
) -> Loaded:
    assert digest is None and transcript is None, "of weights and products that this mode does not have"
    return Loaded(load_plain(network, checkpoint))


def _load_verified(
    network: Network, checkpoint: Checkpoint, digest: ModelDigest | None, transcript: Transcript | None
) -> Loaded:
    verified = Verified(network, checkpoint, digest, transcript)
    return Loaded(verified.make_engine, verified.linears_digest, {"checks": verified.describe()})


# Where somebody asks for them, a digest takes what was loaded, and a transcript the products that others compute.
ENGINES: dict[str, Callable[[Network, Checkpoint, ModelDigest | None, Transcript | None], Loaded]] = {
    "plain": _load_plain,
    "verified": _load_verified,
}
# Of modes without a GPU process.
ALONE_ENGINES: dict[str, Callable[[Network, Checkpoint, ModelDigest | None], MakeEngineAlone]] = {
    "tee-only": load_tee_only
}
