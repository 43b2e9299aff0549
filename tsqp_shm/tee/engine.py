"""The forward pass, as the TEE process sees it: what it computes itself, and what it has computed for it.

Shapes: T tokens, C hidden, H query heads, G kv heads, D head dim, F feed-forward, V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.protocol import Opcode
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.tiling import Segment, Tile, cut_segments, group_tiles, key_range
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
    def load(cls, spec: ModelSpec, checkpoint: Checkpoint) -> NormWeights:
        """Raises:
        ModelFileError: a tensor is missing or has another shape.
        """

        def norm(name: str) -> Float32:
            return checkpoint.tensor(f"model.{name}.weight", (spec.hidden_size,)).to_float32()

        layers = range(spec.num_layers)
        return cls(
            attention=tuple(norm(f"layers.{layer}.input_layernorm") for layer in layers),
            mlp=tuple(norm(f"layers.{layer}.post_attention_layernorm") for layer in layers),
            final=norm("norm"),
        )


class Engine:
    """Runs forward passes over ragged batches; holds no state of a sequence but what lies in the GPU's cache."""

    def __init__(
        self,
        spec: ModelSpec,
        norms: NormWeights,
        slots: Slots,
        queue: SubmissionQueue,
        statistics: Statistics,
    ) -> None:
        plan = slots.plan
        limits = plan.geometry
        self._spec = spec
        self._norms = norms
        self._slots = slots
        self._queue = queue
        self._tile_rows: int = limits["tile_rows"]
        self._ops = Operations(spec, slots, limits["max_model_len"], statistics)
        self._tokens, self._segments_slot = plan.slot("tokens"), plan.slot("segments")
        self._x, self._hidden, self._qk = plan.slot("x"), plan.slot("hidden"), plan.slot("qk")
        self._gate_up, self._act, self._logits = plan.slot("gate_up"), plan.slot("act"), plan.slot("logits")
        self._score_slots = plan.score_slots
        # Private: the residual stream never lies in the arena.
        self._residual: Float32 = np.zeros((limits["max_batch_tokens"], spec.hidden_size), np.float32)

    def forward(self, chunks: Sequence[Chunk]) -> Float32:
        """Runs one step: every chunk's tokens enter the cache.

        Shapes: logits [R, V] f32, the wanted rows of all chunks in order.

        Raises:
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        self._queue.drain()
        token_ids = np.concatenate([np.asarray(chunk.token_ids, np.int32) for chunk in chunks])
        rows = len(token_ids)
        positions = np.concatenate(
            [np.arange(c.position, c.position + len(c.token_ids), dtype=np.int32) for c in chunks]
        )
        segments = cut_segments(((c.sequence, c.position, len(c.token_ids)) for c in chunks), self._tile_rows)
        tiles = group_tiles(segments, self._tile_rows)

        self._embed(token_ids, segments)
        self._ops.load_rows(self._hidden, rows, self._residual[:rows])
        self._ops.add_rms_norm(self._residual, self._norms.attention[0], self._x, rows)
        for layer in range(self._spec.num_layers):
            if layer > 0:
                self._ops.add_rms_norm(self._residual, self._norms.attention[layer], self._x, rows, delta=self._hidden)
            self._run(Opcode.QKV, layer, self._x, self._qk, rows)
            self._ops.rope(self._qk, rows, positions)
            self._attention(layer, rows, segments, tiles)
            self._ops.add_rms_norm(self._residual, self._norms.mlp[layer], self._x, rows, delta=self._hidden)
            self._run(Opcode.GATE_UP, layer, self._x, self._gate_up, rows)
            self._ops.silu_mul(self._gate_up, self._act, rows)
            self._run(Opcode.DOWN, layer, self._act, self._hidden, rows)
        return self._lm_head(_wanted_rows(chunks))

    def _embed(self, token_ids: npt.NDArray[np.int32], segments: list[Segment]) -> None:
        rows = len(token_ids)
        self._slots.view(self._tokens, 0, rows)[:, 0] = token_ids
        self._slots.view(self._segments_slot, 0, len(segments))[:] = segments
        whole = Tile(0, len(segments))
        self._queue.wait(
            self._queue.submit(Opcode.EMBED, in_slot=self._tokens, out_slot=self._hidden, rows=rows, tile=whole)
        )

    def _run(self, opcode: Opcode, layer: int, in_slot: Slot, out_slot: Slot, rows: int) -> None:
        self._queue.wait(self._queue.submit(opcode, layer=layer, in_slot=in_slot, out_slot=out_slot, rows=rows))

    def _attention(self, layer: int, rows: int, segments: list[Segment], tiles: list[Tile]) -> None:
        """qk [T, (H+G)*D] -> hidden [T, C], tile by tile: the GPU process scores the next while this one is
        normalised here."""
        window = self._spec.windows[layer]
        in_flight = len(self._score_slots)

        def submit_scores(index: int) -> int:
            return self._queue.submit(
                Opcode.SCORES,
                layer=layer,
                in_slot=self._qk,
                out_slot=self._score_slots[index % in_flight],
                rows=rows,
                tile=tiles[index],
                tile_bytes=tile_bytes[index],
            )

        def submit_context(index: int) -> int:
            is_last = index == len(tiles) - 1
            return self._queue.submit(
                Opcode.CONTEXT,
                layer=layer,
                in_slot=self._score_slots[index % in_flight],
                out_slot=self._hidden if is_last else None,
                rows=rows,
                tile=tiles[index],
                tile_bytes=tile_bytes[index],
            )

        tile_segments = [segments[t.first_segment : t.first_segment + t.num_segments] for t in tiles]
        tile_bytes = [self._tile_bytes(tile, window) for tile in tile_segments]
        scored = [submit_scores(index) for index in range(min(in_flight, len(tiles)))]
        context = 0
        for index in range(len(tiles)):
            self._queue.wait(scored[index])
            self._ops.softmax(self._score_slots[index % in_flight], tile_segments[index], window)
            context = submit_context(index)
            # The GPU process executes in order, so it has read the slot's probabilities before it scores into it.
            if index + in_flight < len(tiles):
                scored.append(submit_scores(index + in_flight))
        self._queue.wait(context)

    def _tile_bytes(self, segments: list[Segment], window: int | None) -> int:
        slot = self._score_slots[0]
        element_bytes = slot.row_bytes // slot.row_elements
        columns = sum(segment.rows * key_range(segment, window).columns for segment in segments)
        return self._spec.num_heads * columns * element_bytes

    def _lm_head(self, wanted: npt.NDArray[np.int32]) -> Float32:
        """Adds the last delta, normalises the wanted rows and has their logits computed, a slot's worth at a time."""
        logits: Float32 = np.empty((len(wanted), self._spec.vocab_size), np.float32)
        for first in range(0, len(wanted), self._logits.num_rows):
            index = wanted[first : first + self._logits.num_rows]
            rows = len(index)
            self._ops.add_rms_norm(
                self._residual, self._norms.final, self._x, rows, delta=self._hidden, row_index=index
            )
            self._run(Opcode.LM_HEAD, 0, self._x, self._logits, rows)
            self._ops.load_rows(self._logits, rows, logits[first : first + rows])
        return logits


def _wanted_rows(chunks: Sequence[Chunk]) -> npt.NDArray[np.int32]:
    wanted = []
    end = 0
    for chunk in chunks:
        end += len(chunk.token_ids)
        wanted.append(np.arange(end - chunk.num_logits, end, dtype=np.int32))
    return np.concatenate(wanted)
