"""What makes the engine of each mode: its ports, and what leads through them. Names are those of `tsqp_shm.modes`."""

from __future__ import annotations

from collections.abc import Callable

from tsqp_shm.model.digest import ModelDigest
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.tee.engine import MakeEngine, MakeEngineAlone
from tsqp_shm.tee.plain import load_plain
from tsqp_shm.tee.tee_only import load_tee_only

# Each takes what its mode wants of the weights, once a session: the checkpoint is closed afterwards. A digest, where
# somebody asks for one, takes what was loaded.
ENGINES: dict[str, Callable[[Network, Checkpoint, ModelDigest | None], MakeEngine]] = {"plain": load_plain}
# Of modes without a GPU process.
ALONE_ENGINES: dict[str, Callable[[Network, Checkpoint, ModelDigest | None], MakeEngineAlone]] = {
    "tee-only": load_tee_only
}
