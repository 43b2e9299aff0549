"""What makes the engine of each mode: its ports, and what leads through them. Names are those of `tsqp_shm.modes`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from tsqp_shm.config import EngineConfig, Limits
from tsqp_shm.model.digest import ModelDigest
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.tee.blinded import Blinded
from tsqp_shm.tee.engine import MakeEngine, MakeEngineAlone
from tsqp_shm.tee.plain import load_plain
from tsqp_shm.tee.tee_only import load_tee_only
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.tee.verified import Verified


def _nothing_begins(session: str, stack: ExitStack) -> None:
    """Nothing is made for a session."""


def _is_ready(report: Callable[[str], None], look: Callable[[], None]) -> None:
    """Nothing is waited for."""


def _is_told_nothing(device: str) -> None:
    """Nothing depends on it."""


def _works_at_nothing_else(is_busy: bool) -> None:
    """There is nothing that would have to rest meanwhile."""


class Loaded(NamedTuple):
    """What a mode has taken of the weights, once a session: the checkpoint is closed afterwards.

    Attributes:
        make_engine: of each connection.
        linears_digest: of the Linears as integers, for the GPU process to compare; "" where it has no need of them.
        begin: the session of that name begins; what ends with it is laid on the stack.
        wait_until_ready: returns when a first request may come. Called with what takes lines about what is waited for,
            and with what is called now and then meanwhile, and may end the wait.
        meet: a GPU process is ready, with this device, as it says.
        work: steps are computed from here on, or none is for the moment.
        describe: what of it belongs to the bring-up report, as plain values.
        facts: what of it belongs to the statistics.
    """

    make_engine: MakeEngine
    linears_digest: str = ""
    begin: Callable[[str, ExitStack], None] = _nothing_begins
    wait_until_ready: Callable[[Callable[[str], None], Callable[[], None]], None] = _is_ready
    meet: Callable[[str], None] = _is_told_nothing
    work: Callable[[bool], None] = _works_at_nothing_else
    describe: Callable[[], dict[str, Any]] = dict
    facts: Callable[[], dict[str, Any]] = dict


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
    return Loaded(load_plain(of.network, of.checkpoint))


def _load_verified(of: Loading) -> Loaded:
    verified = Verified(of.network, of.checkpoint, of.digest, of.transcript)
    return Loaded(verified.make_engine, verified.linears_digest, describe=verified.describe)


def _load_blinded(of: Loading) -> Loaded:
    blinded = Blinded(*of)
    return Loaded(
        blinded.make_engine,
        blinded.linears_digest,
        blinded.begin,
        blinded.wait_until_ready,
        blinded.meet,
        blinded.work,
        blinded.describe,
        blinded.facts,
    )


ENGINES: dict[str, Callable[[Loading], Loaded]] = {
    "plain": _load_plain,
    "verified": _load_verified,
    "blinded": _load_blinded,
}
# Of modes without a GPU process.
ALONE_ENGINES: dict[str, Callable[[Network, Checkpoint, ModelDigest | None], MakeEngineAlone]] = {
    "tee-only": load_tee_only
}
