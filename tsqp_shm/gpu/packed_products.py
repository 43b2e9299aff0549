"""The model's products on a CPU device: native code on packed weights and a packed KV cache.

Contract: native/products/cpu_products.h.

The same few instructions serve a prompt and one row of decode, and a call costs about a microsecond, where a tensor
library's own bookkeeping would take longer than the arithmetic of one row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tsqp_shm import _native
from tsqp_shm.gpu import _products
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.kv_cache import BlockTable, SequenceLengths
from tsqp_shm.gpu.weights import LinearWeights, Weights
from tsqp_shm.model.network import Layer, Linear, Network
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import NO_SLOT, Record
from tsqp_shm.shm.tiling import Segment, key_range

# A product's depth is cut in blocks of this many.
DEPTH_BLOCK = 32


def is_available(network: Network, plan: Plan, device: torch.device) -> bool:
    """Whether device, instruction set, dtype and widths are those that the native products take."""
    widths = (network.hidden_size, network.intermediate_size, network.head_dim)
    return (
        device.type == "cpu"
        and plan.limits.dtype == "bfloat16"
        and _products.panel_kernels(_native.active_instruction_set()) is not None
        and all(width % DEPTH_BLOCK == 0 for width in widths)
    )


class PackedProducts:
    """Products over slots in place. Shapes and methods: see `gpu.products.Products`."""

    def __init__(
        self, network: Network, plan: Plan, weights: Weights, device: Device, blocks: BlockTable | None = None
    ) -> None:
        limits = plan.limits
        blocks = blocks or BlockTable.identity(limits.max_num_seqs, limits.max_model_len)
        self._lengths = SequenceLengths(limits.max_num_seqs, limits.max_model_len)
        # Layers with one window see the same keys.
        windows = list(dict.fromkeys(network.windows))
        self._windows = windows
        self._window_index = [windows.index(window) for window in network.windows]
        self._native = _products.CpuProducts(
            device.slot_table(),
            _native.active_instruction_set(),
            blocks.entries,
            num_layers=network.num_layers,
            hidden=network.hidden_size,
            intermediate=network.intermediate_size,
            num_heads=network.num_heads,
            num_kv_heads=network.num_kv_heads,
            head_dim=network.head_dim,
            vocabulary=network.vocab_size,
            max_tokens=limits.max_batch_tokens,
        )
        self._native.set_embedding(_bits(weights.embedding))
        # By their index, what computes each.
        self._linears: list[Callable[[int, int, int, int], None]] = []
        for layer in network.layers:
            for linear in layer.linears:
                self._set(layer, linear, next(weights.linears))
                self._linears.append(partial(self._native.linear, layer.index, linear.role))
        self._native.set_lm_head(_bits(next(weights.linears).weight))
        self._linears.append(self._native.lm_head)

    def _set(self, layer: Layer, linear: Linear, weights: LinearWeights) -> None:
        parts = {linear.role: weights}
        if linear is layer.attention.qkv:
            # v goes elsewhere than q and k.
            parts["qk"], parts["v"] = parts.pop("qkv").split(layer.attention.q_width + layer.attention.kv_width)
        for name, part in parts.items():
            bias = None if part.bias is None else _bits(part.bias)
            self._native.set_linear(layer.index, name, _bits(part.weight), bias)

    def begin_step(self, segments: list[Segment]) -> None:
        for stale in self._lengths.advance(segments):
            self._native.clear_values(stale.sequence, stale.start, stale.end)
        seen = [[key_range(segment, window) for segment in segments] for window in self._windows]
        self._native.begin_step(segments, [[(keys.start, keys.columns) for keys in ranges] for ranges in seen])

    def embed(self, record: Record) -> None:
        self._native.embed(record.in_slot, record.out_slot, record.first_row, record.rows)

    def qkv(self, record: Record) -> None:
        self._native.qkv(record.target, record.in_slot, record.out_slot, record.first_row, record.rows)

    def scores(self, record: Record) -> None:
        window = self._window_index[record.target]
        tile = record.first_segment, record.num_segments
        self._native.scores(record.target, window, record.in_slot, record.out_slot, *tile)

    def context(self, record: Record) -> None:
        window = self._window_index[record.target]
        self._native.context(record.target, window, record.in_slot, record.first_segment, record.num_segments)
        if record.out_slot != NO_SLOT:
            self._native.output(record.target, record.out_slot, record.first_row, record.rows)

    def linear(self, record: Record) -> None:
        self._linears[record.target](record.in_slot, record.out_slot, record.first_row, record.rows)


def _bits(tensor: torch.Tensor) -> _products.Bits:
    array: _products.Bits = tensor.view(torch.uint16).numpy()
    return array
