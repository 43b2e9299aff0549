"""What a mode gives the worker: the operations that it can be asked for, and what they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tsqp_shm.gpu.device import Device
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import Record

# By their opcode; each returns the value of its completion, or None.
Operations = Mapping[int, Callable[[Record], int | None]]
# Called with (layers done, layers).
Progress = Callable[[int, int], None]


class DeviceMemory(NamedTuple):
    """What of the device's memory a mode takes beside the slots.

    Attributes:
        arithmetic: what the weights are kept and multiplied in, for people.
        cache_bytes: at most; 0: there is none.
    """

    arithmetic: str
    weights_bytes: int
    cache_bytes: int


class Loaded(NamedTuple):
    """Attributes:
    linears_digest: of the Linears as integers, as the invitation has it; "" in a mode that does not multiply them.
    """

    operations: Operations
    linears_digest: str = ""


class ModeLoader(NamedTuple):
    """Attributes:
    memory: known before anything is loaded.
    load: reads the weights; the checkpoint is closed afterwards.
    """

    memory: Callable[[Network, Plan, Device], DeviceMemory]
    load: Callable[[Network, Plan, Checkpoint, Device, Progress], Loaded]
