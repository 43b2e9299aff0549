"""Attention between the two processes: products and the cache there, rope and softmax here, tiles in flight between.

v never crosses: it stays on the device. o is computed with the context of a block's last tile.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from tsqp_shm.model.network import Attention, Layer
from tsqp_shm.shm.plan import Plan, Slot
from tsqp_shm.shm.protocol import Opcode
from tsqp_shm.shm.tiling import Block, Segment, Tile, key_range
from tsqp_shm.tee.batch import Step
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.submission import SubmissionQueue


class _Scored(NamedTuple):
    """A tile between its SCORES and its CONTEXT."""

    sequence: int
    tile: Tile
    slot: Slot
    segments: list[Segment]
    num_bytes: int


class SplitAttention:
    """QKV, then SCORES and CONTEXT tile by tile: the GPU process scores the next while one is normalised here."""

    def __init__(self, plan: Plan, queue: SubmissionQueue, ops: Operations) -> None:
        self._queue = queue
        self._ops = ops
        self._x, self._qk, self._hidden = plan.slot("x"), plan.slot("qk"), plan.slot("hidden")
        self._score_slots = plan.score_slots
        self._element_bytes = plan.score_slots[0].row_bytes // plan.score_slots[0].row_elements
        self._free_slots: list[Slot] = []
        # Of each block, the last layer whose scores are all submitted.
        self._scored: list[int] = []

    def begin(self, step: Step) -> None:
        self._free_slots = list(self._score_slots)
        self._scored = [-1] * len(step.blocks)

    def run(self, layer: Layer, step: Step, block: Block) -> Task:
        """Yields what `interleave` takes."""
        first, rows = block.first_row, block.rows
        yield self._queue.submit(
            Opcode.QKV, target=layer.index, in_slot=self._x, out_slot=self._qk, first_row=first, rows=rows
        )
        self._ops.rope(layer, self._qk, first, rows, step.positions_of(block))
        # A sequence's keys enter the cache in their order, so a block scores after the one before it.
        while block.number > 0 and self._scored[block.number - 1] < layer.index:
            yield None
        scored: deque[_Scored] = deque()
        context = 0
        left = deque(block.tiles)
        while left or scored:
            while left and self._free_slots:
                scored.append(self._score(layer, step, block, left.popleft()))
            if not left:
                self._scored[block.number] = layer.index
            if not scored:
                yield None
                continue
            oldest = scored.popleft()
            yield oldest.sequence
            self._ops.softmax(layer, oldest.slot, oldest.segments)
            out = None if left or scored else self._hidden
            context = self._submit(Opcode.CONTEXT, layer, block, oldest.tile, oldest.num_bytes, oldest.slot, out)
            # Free as soon as its CONTEXT is submitted: the GPU process executes in order, so it has read the
            # probabilities before it scores into the slot again.
            self._free_slots.append(oldest.slot)
        yield context

    def _score(self, layer: Layer, step: Step, block: Block, tile: Tile) -> _Scored:
        slot = self._free_slots.pop()
        segments = step.segments_of(tile)
        num_bytes = self._tile_bytes(layer.attention, segments)
        sequence = self._submit(Opcode.SCORES, layer, block, tile, num_bytes, self._qk, slot)
        return _Scored(sequence, tile, slot, segments, num_bytes)

    def _tile_bytes(self, attention: Attention, segments: list[Segment]) -> int:
        columns = sum(segment.rows * key_range(segment, attention.window).columns for segment in segments)
        return attention.num_heads * columns * self._element_bytes

    def _submit(
        self,
        opcode: Opcode,
        layer: Layer,
        block: Block,
        tile: Tile,
        tile_bytes: int,
        in_slot: Slot,
        out_slot: Slot | None,
    ) -> int:
        return self._queue.submit(
            opcode,
            target=layer.index,
            in_slot=in_slot,
            out_slot=out_slot,
            first_row=block.first_row,
            rows=block.rows,
            tile=tile,
            tile_bytes=tile_bytes,
        )
