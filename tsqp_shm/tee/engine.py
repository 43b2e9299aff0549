"""The forward pass, as the TEE process sees it: what it computes itself, and what it has computed for it.

A batch goes through the layers in blocks of rows, each a generator that waits for its own submissions. While one
block is with the GPU process another is here, so that neither side waits for the other.

Shapes: T tokens, C hidden, H query heads, G kv heads, D head dim, F feed-forward, V vocabulary, R rows.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tsqp_shm.model.network import Network, Norm
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.protocol import Opcode
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.tiling import Block, Segment, Tile, cut_blocks, cut_segments, group_tiles, key_range
from tsqp_shm.tee.ops import Float32, Operations
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue


@dataclass(frozen=True)
class Chunk:
    """What one sequence contributes to a forward pass.

    Attributes:
        sequence: index of its cache, below max_num_seqs.
        position: position of the first token; everything before it is in the cache.
        token_ids: at least one.
        num_logits: of how many of the last tokens logits are wanted.
    """

    sequence: int
    position: int
    token_ids: Sequence[int]
    num_logits: int = 1


@dataclass(frozen=True)
class NormWeights:
    """RMSNorm weights, private to the TEE. Shapes: each [C] f32."""

    attention: tuple[Float32, ...]
    mlp: tuple[Float32, ...]
    final: Float32

    @classmethod
    def load(cls, network: Network, checkpoint: Checkpoint) -> NormWeights:
        """Raises:
        ModelFileError: a tensor is missing or has another shape.
        """

        def load(norm: Norm) -> Float32:
            return checkpoint.tensor(norm.weight, (norm.size,)).to_float32()

        return cls(
            attention=tuple(load(layer.attention_norm) for layer in network.layers),
            mlp=tuple(load(layer.mlp_norm) for layer in network.layers),
            final=load(network.final_norm),
        )


# What a block yields on its way: the submission it waits for, or None where it cannot go on before another has.
Lane = Iterator[int | None]


class _Step(NamedTuple):
    """What all blocks of a forward pass share. Shapes: positions [T] i32."""

    positions: npt.NDArray[np.int32]
    segments: list[Segment]

    def segments_of(self, tile: Tile) -> list[Segment]:
        return self.segments[tile.first_segment : tile.first_segment + tile.num_segments]


class _Scored(NamedTuple):
    """A tile between its SCORES and its CONTEXT."""

    sequence: int
    tile: Tile
    slot: Slot
    segments: list[Segment]
    num_bytes: int


class Engine:
    """Runs forward passes over ragged batches; holds no state of a sequence but what lies in the GPU's cache."""

    def __init__(
        self,
        network: Network,
        norms: NormWeights,
        slots: Slots,
        queue: SubmissionQueue,
        statistics: Statistics,
    ) -> None:
        plan = slots.plan
        limits = plan.limits
        self._network = network
        self._norms = norms
        self._slots = slots
        self._queue = queue
        self._tile_rows = limits.tile_rows
        self._block_rows = limits.block_rows
        self._ops = Operations(network, slots, limits.max_model_len, statistics)
        self._tokens, self._segments_slot = plan.slot("tokens"), plan.slot("segments")
        self._x, self._hidden, self._qk = plan.slot("x"), plan.slot("hidden"), plan.slot("qk")
        self._gate_up, self._act, self._logits = plan.slot("gate_up"), plan.slot("act"), plan.slot("logits")
        self._score_slots = plan.score_slots
        self._free_slots: list[Slot] = []
        # Of each block, the last layer whose scores are all submitted.
        self._scored: list[int] = []
        # Private: the residual stream never lies in the arena.
        self._residual: Float32 = np.zeros((limits.max_batch_tokens, network.hidden_size), np.float32)

    def forward(self, chunks: Sequence[Chunk]) -> Float32:
        """Runs one step: every chunk's tokens enter the cache.

        Shapes: logits [R, V] f32, the wanted rows of all chunks in order.

        Raises:
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        self._queue.drain()
        token_ids = np.concatenate([np.asarray(chunk.token_ids, np.int32) for chunk in chunks])
        positions = np.concatenate(
            [np.arange(c.position, c.position + len(c.token_ids), dtype=np.int32) for c in chunks]
        )
        segments = cut_segments(((c.sequence, c.position, len(c.token_ids)) for c in chunks), self._tile_rows)
        blocks = cut_blocks(segments, group_tiles(segments, self._tile_rows), self._block_rows)

        self._embed(token_ids, segments)
        # Freed as soon as its CONTEXT is submitted: the GPU process executes in order, so it has read the
        # probabilities before it scores into the slot again.
        self._free_slots = list(self._score_slots)
        self._scored = [-1] * len(blocks)
        step = _Step(positions, segments)
        interleave([self._layers(step, block) for block in blocks], self._queue.wait)
        return self._lm_head(_wanted_rows(chunks))

    def _embed(self, token_ids: npt.NDArray[np.int32], segments: list[Segment]) -> None:
        rows = len(token_ids)
        self._slots.write(self._tokens, token_ids.reshape(-1, 1))
        self._slots.write(self._segments_slot, np.array(segments, np.int32))
        whole = Tile(0, len(segments))
        self._queue.wait(
            self._queue.submit(Opcode.EMBED, in_slot=self._tokens, out_slot=self._hidden, rows=rows, tile=whole)
        )

    def _layers(self, step: _Step, block: Block) -> Lane:
        """A block's way through all layers. Yields what `interleave` takes."""
        ops, norms = self._ops, self._norms
        first, rows = block.first_row, block.rows
        ops.load_rows(self._hidden, first, rows, self._residual[first : first + rows])
        for layer in range(self._network.num_layers):
            delta = self._hidden if layer > 0 else None
            mlp = self._network.layers[layer].mlp
            ops.add_rms_norm(self._residual, norms.attention[layer], self._x, first, rows, delta=delta)
            yield self._submit(Opcode.QKV, layer, self._x, self._qk, block)
            ops.rope(self._qk, first, rows, step.positions[first : first + rows])
            yield from self._attention(step, layer, block)
            ops.add_rms_norm(self._residual, norms.mlp[layer], self._x, first, rows, delta=self._hidden)
            yield self._submit(Opcode.LINEAR, mlp.gate_up.index, self._x, self._gate_up, block)
            ops.silu_mul(self._gate_up, self._act, first, rows)
            yield self._submit(Opcode.LINEAR, mlp.down.index, self._act, self._hidden, block)

    def _attention(self, step: _Step, layer: int, block: Block) -> Lane:
        """qk -> hidden of a block's rows, tile by tile: the GPU process scores the next while this one is
        normalised here."""
        # A sequence's keys enter the cache in their order, so a block scores after the one before it.
        while block.number > 0 and self._scored[block.number - 1] < layer:
            yield None
        window = self._network.windows[layer]
        scored: deque[_Scored] = deque()
        context = 0
        left = deque(block.tiles)
        while left or scored:
            while left and self._free_slots:
                tile, slot = left.popleft(), self._free_slots.pop()
                segments = step.segments_of(tile)
                num_bytes = self._tile_bytes(segments, window)
                sequence = self._submit_tile(Opcode.SCORES, layer, block, tile, num_bytes, self._qk, slot)
                scored.append(_Scored(sequence, tile, slot, segments, num_bytes))
            if not left:
                self._scored[block.number] = layer
            if not scored:
                yield None
                continue
            sequence, tile, slot, segments, num_bytes = scored.popleft()
            yield sequence
            self._ops.softmax(slot, segments, window)
            out = None if left or scored else self._hidden
            context = self._submit_tile(Opcode.CONTEXT, layer, block, tile, num_bytes, slot, out)
            self._free_slots.append(slot)
        yield context

    def _submit(self, opcode: Opcode, target: int, in_slot: Slot, out_slot: Slot, block: Block) -> int:
        return self._queue.submit(
            opcode, target=target, in_slot=in_slot, out_slot=out_slot, first_row=block.first_row, rows=block.rows
        )

    def _submit_tile(
        self,
        opcode: Opcode,
        layer: int,
        block: Block,
        tile: Tile,
        tile_bytes: int,
        in_slot: Slot,
        out_slot: Slot | None,
    ) -> int:
        return self._queue.submit(
            opcode,
            target=layer,
            in_slot=in_slot,
            out_slot=out_slot,
            first_row=block.first_row,
            rows=block.rows,
            tile=tile,
            tile_bytes=tile_bytes,
        )

    def _tile_bytes(self, segments: list[Segment], window: int | None) -> int:
        slot = self._score_slots[0]
        element_bytes = slot.row_bytes // slot.row_elements
        columns = sum(segment.rows * key_range(segment, window).columns for segment in segments)
        return self._network.num_heads * columns * element_bytes

    def _lm_head(self, wanted: npt.NDArray[np.int32]) -> Float32:
        """Adds the last delta, normalises the wanted rows and has their logits computed, a slot's worth at a time."""
        logits: Float32 = np.empty((len(wanted), self._network.vocab_size), np.float32)
        for first in range(0, len(wanted), self._logits.num_rows):
            index = wanted[first : first + self._logits.num_rows]
            rows = len(index)
            self._ops.add_rms_norm(
                self._residual, self._norms.final, self._x, 0, rows, delta=self._hidden, row_index=index
            )
            self._queue.wait(
                self._submit(Opcode.LINEAR, self._network.lm_head.index, self._x, self._logits, Block(0, 0, rows, ()))
            )
            self._ops.load_rows(self._logits, 0, rows, logits[first : first + rows])
        return logits


def _wanted_rows(chunks: Sequence[Chunk]) -> npt.NDArray[np.int32]:
    wanted = []
    end = 0
    for chunk in chunks:
        end += len(chunk.token_ids)
        wanted.append(np.arange(end - chunk.num_logits, end, dtype=np.int32))
    return np.concatenate(wanted)


def interleave(lanes: Sequence[Lane], wait: Callable[[int], object]) -> None:
    """Runs lanes to their ends, each going on when the submission that it waits for is complete, the oldest first.

    Args:
        wait: called with the sequence numbers that lanes yield, in ascending order.
    """
    awaited: list[tuple[int, int]] = []
    stuck = list(range(len(lanes)))
    while stuck or awaited:
        if awaited:
            sequence, index = heapq.heappop(awaited)
            wait(sequence)
            going = [index, *stuck]
        else:
            going = stuck
        stuck = []
        for index in going:
            try:
                found = next(lanes[index])
            except StopIteration:
                continue
            if found is None:
                stuck.append(index)
            else:
                heapq.heappush(awaited, (found, index))
