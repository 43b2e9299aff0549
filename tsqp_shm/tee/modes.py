"""What makes the engine of each mode: its ports, and what leads through them. Names are those of `tsqp_shm.modes`."""

from __future__ import annotations

from collections.abc import Callable

from tsqp_shm.model.network import Network
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.engine import Engine
from tsqp_shm.tee.norms import NormWeights
from tsqp_shm.tee.plain import plain_engine
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue

MakeEngine = Callable[[Network, NormWeights, Slots, SubmissionQueue, Statistics], Engine]

ENGINES: dict[str, MakeEngine] = {"plain": plain_engine}
