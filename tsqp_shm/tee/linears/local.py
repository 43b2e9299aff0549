"""Linears of this process: int8 weights, integer products, private memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tsqp_shm import _native
from tsqp_shm.model.network import Linear
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.ops import Operations


class LocalLinears:
    """Each by `native/field`; waits for nobody.

    Args:
        weights: of each Linear, at its index.
        look: called after each; what it raises ends the step.
    """

    def __init__(self, weights: Sequence[_native.FieldLinear], ops: Operations, look: Callable[[], None]) -> None:
        self._weights = weights
        self._ops = ops
        self._look = look

    def apply(self, linear: Linear, block: Block, x: Slot, out: Slot) -> Task:
        self._ops.linear(linear, self._weights[linear.index], x, out, block.first_row, block.rows)
        self._look()
        yield from ()
