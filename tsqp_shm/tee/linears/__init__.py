"""Where Linears are computed: a port, and a module for each way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tsqp_shm.errors import PadsExhausted
from tsqp_shm.model.network import Linear
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.batch import Chunk, Step
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.verification import Verification


class LinearsPort(Protocol):
    """The ways to a Linear's product; a mode has one."""

    def apply(self, linear: Linear, block: Block, x: Slot, out: Slot) -> Task:
        """x W^T + b of the block's rows, from slot to slot, at the same rows of both.

        Shapes: x [T, inputs]; out [T, outputs].
        """


class CheckedLinears(LinearsPort, Protocol):
    """Those of a GPU process whose products are checked."""

    def begin(self, verification: Verification, step: Step) -> None:
        """A pass begins, to which the checks belong from here on; nothing of an earlier one is in flight any more."""

    def check_arrived(self) -> None:
        """Checks what has arrived of a pass that breaks off."""

    def lack_pads(self, chunks: Sequence[Chunk]) -> Mapping[int, PadsExhausted]:
        """As `Ports.lack_pads`."""
