"""Where a forward pass begins: tokens become rows of the residual stream."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tsqp_shm.model.weights import Tensor
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import Opcode
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.tiling import Block, Tile
from tsqp_shm.tee.batch import Int32, Step
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.ops import Float32, Operations
from tsqp_shm.tee.submission import SubmissionQueue


class EmbeddingPort(Protocol):
    """The ways to an embedding; a mode has one."""

    def begin(self, step: Step) -> Task:
        """What has to be done before any block's rows can be had."""

    def load(self, block: Block, out: Float32) -> None:
        """A block's rows. Shapes: out [rows, C] f32."""


class RemoteEmbedding:
    """The GPU process looks the rows up. Its step begins here too: it reads the segment table and makes room in its
    cache."""

    def __init__(self, plan: Plan, slots: Slots, queue: SubmissionQueue, ops: Operations) -> None:
        self._slots = slots
        self._queue = queue
        self._ops = ops
        self._tokens, self._segments, self._hidden = plan.slot("tokens"), plan.slot("segments"), plan.slot("hidden")

    def begin(self, step: Step) -> Task:
        self._slots.write(self._tokens, step.token_ids.reshape(-1, 1))
        self._slots.write(self._segments, np.array(step.segments, np.int32))
        whole = Tile(0, len(step.segments))
        yield self._queue.submit(
            Opcode.EMBED, in_slot=self._tokens, out_slot=self._hidden, rows=len(step.token_ids), tile=whole
        )

    def load(self, block: Block, out: Float32) -> None:
        self._ops.load_rows(self._hidden, block.first_row, block.rows, out)


class PrivateEmbedding:
    """Looked up in a table of this process. Which rows are read shows in the addresses: see docs/threat-model.md."""

    def __init__(self, table: Tensor, ops: Operations) -> None:
        self._table = table
        self._ops = ops
        self._token_ids: Int32 = np.empty(0, np.int32)

    def begin(self, step: Step) -> Task:
        self._token_ids = step.token_ids
        yield from ()

    def load(self, block: Block, out: Float32) -> None:
        self._ops.look_up(self._table, self._token_ids[block.first_row : block.first_row + block.rows], out)
