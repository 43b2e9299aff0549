"""The model's products on a CPU device: native code on packed weights and a packed KV cache.

Contract: native/products/cpu_products.h.

The same few instructions serve a prompt and one row of decode, and a call costs about a microsecond, where a tensor
library's own bookkeeping would take longer than the arithmetic of one row.
"""

from __future__ import annotations

import torch

from tsqp_shm import _native
from tsqp_shm.gpu import _products
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.kv_cache import BlockTable, SequenceLengths
from tsqp_shm.gpu.weights import Linear, Weights
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import NO_SLOT, Record
from tsqp_shm.shm.tiling import Segment, key_range

# A product's depth is cut in blocks of this many.
DEPTH_BLOCK = 32


def is_available(spec: ModelSpec, plan: Plan, device: torch.device) -> bool:
    """Whether device, instruction set, dtype and widths are those that the native products take."""
    widths = (spec.hidden_size, spec.intermediate_size, spec.head_dim)
    return (
        device.type == "cpu"
        and plan.limits.dtype == "bfloat16"
        and _products.panel_kernels(_native.active_instruction_set()) is not None
        and all(width % DEPTH_BLOCK == 0 for width in widths)
    )


class PackedProducts:
    """Products over slots in place. Shapes and methods: see `gpu.products.Products`."""

    def __init__(
        self, spec: ModelSpec, plan: Plan, weights: Weights, device: Device, blocks: BlockTable | None = None
    ) -> None:
        limits = plan.limits
        blocks = blocks or BlockTable.identity(limits.max_num_seqs, limits.max_model_len)
        self._lengths = SequenceLengths(limits.max_num_seqs, limits.max_model_len)
        # Layers with one window see the same keys.
        windows = list(dict.fromkeys(spec.windows))
        self._windows = windows
        self._window_index = [windows.index(window) for window in spec.windows]
        self._native = _products.CpuProducts(
            device.slot_table(),
            _native.active_instruction_set(),
            blocks.entries,
            num_layers=spec.num_layers,
            hidden=spec.hidden_size,
            intermediate=spec.intermediate_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            vocabulary=spec.vocab_size,
            max_tokens=limits.max_batch_tokens,
        )
        self._native.set_embedding(_bits(weights.embedding))
        self._native.set_lm_head(_bits(weights.lm_head.weight))
        for index, layer in enumerate(weights.layers):
            for name in ("qk", "v", "o", "gate_up", "down"):
                linear: Linear = getattr(layer, name)
                bias = None if linear.bias is None else _bits(linear.bias)
                self._native.set_linear(index, name, _bits(linear.weight), bias)

    def begin_step(self, segments: list[Segment]) -> None:
        for stale in self._lengths.advance(segments):
            self._native.clear_values(stale.sequence, stale.start, stale.end)
        seen = [[key_range(segment, window) for segment in segments] for window in self._windows]
        self._native.begin_step(segments, [[(keys.start, keys.columns) for keys in ranges] for ranges in seen])

    def embed(self, record: Record) -> None:
        self._native.embed(record.in_slot, record.out_slot, record.first_row, record.rows)

    def qkv(self, record: Record) -> None:
        self._native.qkv(record.layer, record.in_slot, record.out_slot, record.first_row, record.rows)

    def scores(self, record: Record) -> None:
        window = self._window_index[record.layer]
        tile = record.first_segment, record.num_segments
        self._native.scores(record.layer, window, record.in_slot, record.out_slot, *tile)

    def context(self, record: Record) -> None:
        window = self._window_index[record.layer]
        self._native.context(record.layer, window, record.in_slot, record.first_segment, record.num_segments)
        if record.out_slot != NO_SLOT:
            self._native.output(record.layer, record.out_slot, record.first_row, record.rows)

    def gate_up(self, record: Record) -> None:
        self._linear("gate_up", record)

    def down(self, record: Record) -> None:
        self._linear("down", record)

    def lm_head(self, record: Record) -> None:
        self._native.lm_head(record.in_slot, record.out_slot, record.first_row, record.rows)

    def _linear(self, name: str, record: Record) -> None:
        self._native.linear(record.layer, name, record.in_slot, record.out_slot, record.first_row, record.rows)


def _bits(tensor: torch.Tensor) -> _products.Bits:
    array: _products.Bits = tensor.view(torch.uint16).numpy()
    return array
