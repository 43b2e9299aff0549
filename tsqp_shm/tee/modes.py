"""What makes the engine of each mode: its ports, and what leads through them. Names are those of `tsqp_shm.modes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tsqp_shm.config import EngineConfig, Limits
from tsqp_shm.model.digest import ModelDigest
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.tee.blinded import Blinded
from tsqp_shm.tee.engine import MakeEngineAlone
from tsqp_shm.tee.loaded import Loaded
from tsqp_shm.tee.plain import Plain
from tsqp_shm.tee.tee_only import load_tee_only
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.tee.verified import Verified


class Loading(NamedTuple):
    """What a mode with a GPU process loads from and for.

    Attributes:
        digest: takes what is loaded; None: nobody asks for it.
        transcript: takes the products that others compute; None: nobody asks for them.
    """

    network: Network
    checkpoint: Checkpoint
    config: EngineConfig
    limits: Limits
    digest: ModelDigest | None
    transcript: Transcript | None


def _load_plain(of: Loading) -> Loaded:
    assert of.digest is None and of.transcript is None, "of weights and products that this mode does not have"
    return Plain(of.network, of.checkpoint)


def _load_verified(of: Loading) -> Loaded:
    return Verified(of.network, of.checkpoint, of.digest, of.transcript)


def _load_blinded(of: Loading) -> Loaded:
    return Blinded(*of)


ENGINES: dict[str, Callable[[Loading], Loaded]] = {
    "plain": _load_plain,
    "verified": _load_verified,
    "blinded": _load_blinded,
}
# Of modes without a GPU process.
ALONE_ENGINES: dict[str, Callable[[Network, Checkpoint, ModelDigest | None], MakeEngineAlone]] = {
    "tee-only": load_tee_only
}
