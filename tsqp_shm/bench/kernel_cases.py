"""The TEE's kernels on the slots of an arena, each beside what torch does for the same result.

Shapes: T tokens, C hidden, H query heads, G kv heads, D head dim, F feed-forward, S cached keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig
from tsqp_shm.model.rope import rope_tables
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan, SlotShape
from tsqp_shm.shm.slots import Slots, slot_array
from tsqp_shm.shm.tiling import padded_length

Run = Callable[[], None]


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one shape.

    Attributes:
        moved_bytes: what it reads and writes, once each; a copy of half as many bytes moves the same.
        ours: runs the kernel with the instruction set in use; theirs: the same in torch; copy: the same bytes moved.
    """

    name: str
    shape: str
    moved_bytes: int
    ours: Run
    theirs: Run
    copy: Run


def kernel_plan(spec: ModelSpec, tokens: int) -> Plan:
    """The slots of a prefill of so many tokens, and two to copy between."""
    tile = min(EngineConfig.tile_rows, tokens)
    heads = spec.num_heads + spec.num_kv_heads
    copied = max(
        3 * tokens * spec.intermediate_size,
        3 * tokens * spec.hidden_size,
        spec.num_heads * tile * padded_length(tokens),
    )
    shapes = {
        "x": (tokens, spec.hidden_size),
        "hidden": (tokens, spec.hidden_size),
        "qk": (tokens, heads * spec.head_dim),
        "gate_up": (tokens, 2 * spec.intermediate_size),
        "act": (tokens, spec.intermediate_size),
        "scores": (spec.num_heads * tile, padded_length(tokens)),
        "copy.from": (1, copied),
        "copy.to": (1, copied),
    }
    return Plan.of_slots([SlotShape(name, "bfloat16", rows, elements) for name, (rows, elements) in shapes.items()])


def kernel_cases(spec: ModelSpec, tokens: int, arena: Arena, slots: Slots) -> list[KernelCase]:
    """Softmax of the last tile, whose rows see nearly all columns; the others over all rows."""
    plan, table = arena.plan, slots.table
    index = {slot.name: slot.index for slot in plan.slots}
    hidden, inner, dim, heads = spec.hidden_size, spec.intermediate_size, spec.head_dim, spec.num_heads
    all_heads, eps = heads + spec.num_kv_heads, spec.rms_norm_eps
    tile, columns = min(EngineConfig.tile_rows, tokens), padded_length(tokens)
    drawn = np.random.default_rng(0)
    tensors = {slot.name: torch.from_numpy(slot_array(arena, slot)).view(torch.bfloat16) for slot in plan.slots}
    for tensor in tensors.values():
        tensor.copy_(torch.from_numpy(drawn.standard_normal(tensor.shape, np.float32)))

    residual, weight = np.zeros((tokens, hidden), np.float32), np.ones(hidden, np.float32)
    residual_tensor, weight_tensor = torch.zeros(tokens, hidden), torch.ones(hidden)
    positions = np.arange(tokens, dtype=np.int32)
    cos, sin = rope_tables(spec.rope, dim, tokens)
    cos_tensor, sin_tensor = (torch.from_numpy(np.tile(t, 2)).bfloat16().unsqueeze(1) for t in (cos, sin))
    scale, first_valid_end = 1 / math.sqrt(dim), tokens - tile + 1
    mask = torch.full((tile, columns), -torch.inf, dtype=torch.bfloat16).triu(first_valid_end)

    def softmax() -> None:
        _native.softmax(table, index["scores"], 0, heads, tile, columns, scale, first_valid_end, None)

    def torch_softmax() -> None:
        scores = tensors["scores"].view(heads, tile, columns)
        scores.copy_(functional.softmax(scores * scale + mask, dim=-1, dtype=torch.float32))

    def add_rms_norm() -> None:
        _native.add_rms_norm(table, index["x"], 0, index["hidden"], residual, None, 0, tokens, weight, eps)

    def torch_add_rms_norm() -> None:
        residual_tensor.add_(tensors["hidden"])
        tensors["x"].copy_(functional.rms_norm(residual_tensor, (hidden,), weight_tensor, eps))

    def rope() -> None:
        _native.rope(table, index["qk"], 0, tokens, positions, cos, sin, all_heads, dim)

    def torch_rope() -> None:
        x = tensors["qk"].view(tokens, all_heads, dim)
        low, high = x.chunk(2, -1)
        x.copy_(x * cos_tensor + torch.cat((-high, low), -1) * sin_tensor)

    def silu_mul() -> None:
        _native.silu_mul(table, index["gate_up"], index["act"], 0, tokens)

    def torch_silu_mul() -> None:
        gate, up = tensors["gate_up"].chunk(2, -1)
        torch.mul(functional.silu(gate), up, out=tensors["act"])

    def copy(moved_bytes: int) -> Run:
        # Half is read and half is written, two bytes an element.
        source, target = (tensors[name].view(-1)[: moved_bytes // 4] for name in ("copy.from", "copy.to"))

        def run() -> None:
            target.copy_(source)

        return run

    found = (
        ("softmax", (heads, tile, columns), 4 * heads * tile * columns, softmax, torch_softmax),
        ("add_rms_norm", (tokens, hidden), 12 * tokens * hidden, add_rms_norm, torch_add_rms_norm),
        ("rope", (tokens, all_heads, dim), 4 * tokens * all_heads * dim, rope, torch_rope),
        ("silu_mul", (tokens, inner), 6 * tokens * inner, silu_mul, torch_silu_mul),
    )
    return [
        KernelCase(name, " x ".join(f"{n:,}" for n in shape), moved, ours, theirs, copy(moved))
        for name, shape, moved, ours, theirs in found
    ]
