"""Where Linears are computed: a port, and a module for each way."""

from __future__ import annotations

from typing import Protocol

from tsqp_shm.model.network import Linear
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.interleave import Task


class LinearsPort(Protocol):
    """The ways to a Linear's product; a mode has one."""

    def apply(self, linear: Linear, block: Block, x: Slot, out: Slot) -> Task:
        """x W^T + b of the block's rows, from slot to slot, at the same rows of both.

        Shapes: x [T, inputs]; out [T, outputs].
        """
