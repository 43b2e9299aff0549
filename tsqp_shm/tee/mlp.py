"""The half of a layer behind attention: two Linears with a gate between them."""

from __future__ import annotations

from tsqp_shm.model.network import Layer
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.linears import LinearsPort
from tsqp_shm.tee.ops import Operations


class GatedMlp:
    """down(activation(gate) * up). The gate is computed here, the Linears by the port."""

    def __init__(self, plan: Plan, linears: LinearsPort, ops: Operations) -> None:
        self._linears = linears
        self._gates = {"silu": ops.silu_mul}
        self._x, self._hidden = plan.slot("x"), plan.slot("hidden")
        self._gate_up, self._act = plan.slot("gate_up"), plan.slot("act")

    def run(self, layer: Layer, block: Block) -> Task:
        """Slot x -> slot hidden, of the block's rows. Shapes: x, hidden [T, C]."""
        mlp = layer.mlp
        yield from self._linears.apply(mlp.gate_up, block, self._x, self._gate_up)
        self._gates[mlp.activation](self._gate_up, self._act, block.first_row, block.rows)
        yield from self._linears.apply(mlp.down, block, self._act, self._hidden)
