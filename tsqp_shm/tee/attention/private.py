"""Attention of this process: keys and values in private caches, one kernel for scores, softmax and context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tsqp_shm import _native
from tsqp_shm.model.network import Layer, Network
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.tiling import KEY_BLOCK, Block
from tsqp_shm.tee.batch import Int32, Step
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.linears import LinearsPort
from tsqp_shm.tee.ops import Operations


class PrivateAttention:
    """qkv by the Linears' port, rope, the kernel, o by the port.

    Args:
        caches: of each layer, at its index.
    """

    def __init__(
        self, plan: Plan, linears: LinearsPort, ops: Operations, caches: Sequence[_native.KeyValueCache]
    ) -> None:
        self._linears = linears
        self._ops = ops
        self._caches = caches
        self._x, self._qkv = plan.slot("x"), plan.slot("qkv")
        self._heads, self._hidden = plan.slot("heads"), plan.slot("hidden")
        # Of each block of the step.
        self._segments: list[Int32] = []

    def begin(self, step: Step) -> None:
        self._segments = [
            np.array([segment for tile in block.tiles for segment in step.segments_of(tile)], np.int32)
            for block in step.blocks
        ]

    def run(self, layer: Layer, step: Step, block: Block) -> Task:
        of = layer.attention
        yield from self._linears.apply(of.qkv, block, self._x, self._qkv)
        self._ops.rope(layer, self._qkv, block.first_row, block.rows, step.positions_of(block))
        self._ops.attend(layer, self._caches[layer.index], self._qkv, self._heads, self._segments[block.number], block)
        yield from self._linears.apply(of.o, block, self._heads, self._hidden)


def private_caches(network: Network, plan: Plan, element: str = "bfloat16") -> list[_native.KeyValueCache]:
    """Of each layer, for all sequences of a session; their memory is taken as it is first used."""
    blocks = _identity_blocks(plan)
    return [
        _native.KeyValueCache(layer.attention.num_kv_heads, layer.attention.head_dim, blocks, element)
        for layer in network.layers
    ]


def _identity_blocks(plan: Plan) -> Int32:
    """Where each block of keys of a sequence lies: one behind the other. Shapes: [sequences, blocks] i32."""
    limits = plan.limits
    blocks = -(-limits.max_model_len // KEY_BLOCK)
    return np.arange(limits.max_num_seqs * blocks, dtype=np.int32).reshape(limits.max_num_seqs, blocks)
