"""Linears of the GPU process, in clear and unchecked."""

from __future__ import annotations

from tsqp_shm.model.network import Linear
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.protocol import Opcode
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.submission import SubmissionQueue


class RemoteLinears:
    """Each a submission that names the Linear."""

    def __init__(self, queue: SubmissionQueue) -> None:
        self._queue = queue

    def apply(self, linear: Linear, block: Block, x: Slot, out: Slot) -> Task:
        yield self._queue.submit(
            Opcode.LINEAR, target=linear.index, in_slot=x, out_slot=out, first_row=block.first_row, rows=block.rows
        )
