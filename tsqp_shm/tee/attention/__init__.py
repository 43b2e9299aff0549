"""Where attention is computed and its keys and values are kept: a port, and a module for each way."""

from __future__ import annotations

from typing import Protocol

from tsqp_shm.model.network import Layer
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.batch import Step
from tsqp_shm.tee.interleave import Task


class AttentionPort(Protocol):
    """The ways to attention, its Linears included; a mode has one."""

    def begin(self, step: Step) -> None:
        """A forward pass begins; nothing of an earlier one is under way."""

    def run(self, layer: Layer, step: Step, block: Block) -> Task:
        """Slot x -> slot hidden, of the block's rows; their keys and values enter the cache.

        Shapes: x, hidden [T, C].
        """
