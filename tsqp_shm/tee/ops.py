"""What the TEE process computes: native kernels on slots, each timed.

Shapes: T tokens, C hidden, H query heads, G kv heads, D head dim, F feed-forward, V vocabulary, R rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tsqp_shm import _native
from tsqp_shm.model.network import Layer, Linear, Network, Norm
from tsqp_shm.model.rope import rope_tables
from tsqp_shm.model.weights import Tensor
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.tiling import Block, Segment, key_range
from tsqp_shm.tee.norms import NormWeights
from tsqp_shm.tee.statistics import Statistics

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


class Operations:
    """The model's light half: everything that sees activations between two Linears."""

    def __init__(self, network: Network, norms: NormWeights, slots: Slots, statistics: Statistics) -> None:
        self._norms = norms
        self._slots = slots
        self._statistics = statistics
        # Layers with one rope have one pair of tables.
        by_layer = [(layer.attention.rope, layer.attention.head_dim) for layer in network.layers]
        tables = {rope: rope_tables(*rope, slots.plan.limits.max_model_len) for rope in dict.fromkeys(by_layer)}
        self._rope_tables = [tables[rope] for rope in by_layer]

    def load_rows(self, slot: Slot, first_row: int, rows: int, out: Float32) -> None:
        """Widens slot [rows, W] into private out [rows, W] f32."""
        self._run("LOAD", _native.load_rows, self._slots.own(slot, first_row, rows), first_row, rows, out)

    def add_norm(
        self,
        norm: Norm,
        residual: Float32,
        out: Slot,
        first_row: int,
        rows: int,
        delta: Slot | None = None,
        row_index: Int32 | None = None,
    ) -> None:
        """residual [T, C] f32 += delta [T, C]; out [rows, C] = RMSNorm(residual) * the norm's weight.

        Args:
            first_row: of residual, delta and out alike; 0 with row_index.
            row_index: which row of residual and delta each output row takes.
        """
        out_index = self._slots.own(out, first_row, rows)
        delta_index = None
        if delta is not None:
            delta_rows = (0, None) if row_index is not None else (first_row, rows)
            delta_index = self._slots.own(delta, *delta_rows)
        self._run(
            "RMSNORM", _native.add_rms_norm, out_index, first_row, delta_index, residual, row_index, first_row, rows,
            self._norms[norm], norm.eps,
        )  # fmt: skip

    def rope(self, layer: Layer, slot: Slot, first_row: int, rows: int, positions: Int32) -> None:
        """Rotates q and k in place: slot [T, (H+G)*D]; positions [rows]."""
        index = self._slots.own(slot, first_row, rows)
        attention, (cos, sin) = layer.attention, self._rope_tables[layer.index]
        heads = attention.num_heads + attention.num_kv_heads
        self._run("ROPE", _native.rope, index, first_row, rows, positions, cos, sin, heads, attention.head_dim)

    def softmax(self, layer: Layer, slot: Slot, segments: Sequence[Segment]) -> None:
        """Scales, masks and normalises a tile in place: one dense [H, rows, columns] block per segment."""
        index = self._slots.own(slot)
        heads, scale, window = layer.attention.num_heads, layer.attention.scale, layer.attention.window
        offset = 0
        for segment in segments:
            seen = key_range(segment, window)
            first_valid_end = segment.position + 1 - seen.start
            self._run(
                "SOFTMAX", _native.softmax, index, offset, heads, segment.rows, seen.columns, scale,
                first_valid_end, window,
            )  # fmt: skip
            offset += heads * segment.rows * seen.columns

    def silu_mul(self, gate_up: Slot, out: Slot, first_row: int, rows: int) -> None:
        """out [T, F] = silu(gate) * up, from gate_up [T, 2F]."""
        gate_up_index, out_index = self._slots.own(gate_up, first_row, rows), self._slots.own(out, first_row, rows)
        self._run("SILU", _native.silu_mul, gate_up_index, out_index, first_row, rows)

    def look_up(self, table: Tensor, token_ids: Int32, out: Float32) -> None:
        """out [rows, C] f32 = the table's rows of token_ids [rows]."""
        started_ns = time.perf_counter_ns()
        out[:] = replace(table, data=table.data[token_ids]).to_float32()
        self._statistics.count("EMBED", started_ns)

    def linear(
        self, linear: Linear, weights: _native.FieldLinear, x: Slot, out: Slot, first_row: int, rows: int
    ) -> None:
        """out [rows, outputs] = x [rows, inputs] quantised, times the int8 weights, scaled back, plus the bias."""
        x_index, out_index = self._slots.own(x, first_row, rows), self._slots.own(out, first_row, rows)
        started_ns = time.perf_counter_ns()
        weights.apply(self._slots.table, x_index, out_index, first_row, rows)
        self._statistics.count(linear.role.upper(), started_ns)

    def quantise(
        self,
        check: _native.FieldCheck,
        x: Slot,
        m: Slot,
        first_row: int,
        rows: int,
        copy: npt.NDArray[np.uint32] | None = None,
        pads: _native.PadRows | None = None,
    ) -> None:
        """m [rows, inputs] = x [rows, inputs] as integers of the field, less the pads; `copy` is given the same."""
        x_index, m_index = self._slots.own(x, first_row, rows), self._slots.own(m, first_row, rows)
        started_ns = time.perf_counter_ns()
        check.begin(self._slots.table, x_index, m_index, first_row, rows, copy, pads)
        self._statistics.count("QUANTISE", started_ns)

    def check(
        self,
        check: _native.FieldCheck,
        y: Slot,
        out: Slot,
        first_row: int,
        rows: int,
        copy: npt.NDArray[np.uint32] | None = None,
    ) -> bool:
        """out [rows, outputs] = the result of y [rows, outputs], the product of what `quantise` gave; `copy` is given y
        as it was read.

        Returns:
            Whether it is that product.
        """
        y_index, out_index = self._slots.own(y, first_row, rows), self._slots.own(out, first_row, rows)
        started_ns = time.perf_counter_ns()
        held = check.finish(self._slots.table, y_index, out_index, first_row, rows, copy)
        self._statistics.count("CHECK", started_ns)
        return held

    def attend(
        self, layer: Layer, cache: _native.KeyValueCache, qkv: Slot, out: Slot, segments: Int32, block: Block
    ) -> None:
        """Has the block's keys and values enter the cache; out [rows, H*D] = what its queries make of it.

        Shapes: qkv [T, (H+2G)*D], its q and k rotated; segments [N, 4] i32, the block's.
        """
        of, rows = layer.attention, (block.first_row, block.rows)
        qkv_index, out_index = self._slots.own(qkv, *rows), self._slots.own(out, *rows)
        started_ns = time.perf_counter_ns()
        _native.attend(
            cache, self._slots.table, qkv_index, out_index, segments,
            num_heads=of.num_heads, scale=of.scale, window=of.window,
        )  # fmt: skip
        self._statistics.count("ATTENTION", started_ns)

    def _run(self, operation: str, kernel: Callable[..., None], *arguments: object) -> None:
        started_ns = time.perf_counter_ns()
        kernel(self._slots.table, *arguments)
        self._statistics.count(operation, started_ns)
