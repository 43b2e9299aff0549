"""Engines whose Linears are computed in a way that a test chooses: natively, in plain numpy, or apart and checked."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import field_reference
import numpy as np
import pytest

from tsqp_shm import _native
from tsqp_shm.config import Limits
from tsqp_shm.model.field_weights import load_field_linear
from tsqp_shm.model.network import Linear, Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Plan, Slot
from tsqp_shm.shm.protocol import Opcode
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.attention.private import PrivateAttention, private_caches
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.embedding import PrivateEmbedding
from tsqp_shm.tee.engine import Engine, Ports
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.linears import LinearsPort
from tsqp_shm.tee.linears.field import FieldLinears
from tsqp_shm.tee.linears.local import LocalLinears
from tsqp_shm.tee.norms import NormWeights
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.statistics import Statistics

LIMITS = Limits(
    "float32",
    max_model_len=160,
    max_num_seqs=3,
    max_batch_tokens=150,
    tile_rows=16,
    tiles_in_flight=2,
    block_rows=40,
    mode="tee-only",
)


def secret_vectors(linear: _native.FieldLinear) -> np.ndarray:
    """Two, of the field. Shapes: [2, outputs] u32."""
    return np.random.default_rng().integers(0, 2**31 - 1, (2, len(linear.scales)), np.uint32)


class NumpyLinears:
    """Each in plain numpy, with int64, or with float64, whose sums are exact below 2^53."""

    def __init__(
        self, network: Network, checkpoint: Checkpoint, slots: Slots, first_bound: int, kind: type = np.int64
    ) -> None:
        self._slots = slots
        self._first_bound = first_bound
        self._weights = []
        for linear in network.linears:
            parts = [checkpoint.tensor(part.weight, (part.rows, linear.inputs)).to_float32() for part in linear.parts]
            biases = [checkpoint.tensor(part.bias, (part.rows,)).to_float32() for part in linear.parts if part.bias]
            integers, scales = field_reference.quantised_weights(np.concatenate(parts))
            self._weights.append((integers.astype(kind), scales, np.concatenate(biases) if biases else None))

    def apply(self, linear: Linear, block, x, out):
        rows = self._slots.view(x, block.first_row, block.rows)
        result = field_reference.product(rows, *self._weights[linear.index], self._first_bound)
        self._slots.view(out, block.first_row, block.rows)[:] = result
        yield from ()


class MultipliesWhenWaitedFor:
    """In the place of the queue and the GPU process behind it: a product is made, natively, when it is waited for."""

    def __init__(self, weights: Sequence[_native.FieldLinear], slots: Slots) -> None:
        self._weights = weights
        self._table = slots.table
        self._products: list[tuple[int, int, int, int, int]] = []
        self._done = 0

    def begin_step(self) -> None:
        assert self._done == len(self._products)

    def submit(self, opcode: Opcode, *, target: int, in_slot: Slot, out_slot: Slot, first_row: int, rows: int) -> int:
        assert opcode == Opcode.LINEAR
        self._products.append((target, in_slot.index, out_slot.index, first_row, rows))
        return len(self._products)

    def wait(self, sequence: int) -> None:
        for target, *operands in self._products[self._done : sequence]:
            self._weights[target].multiply(self._table, *operands)
        self._done = max(self._done, sequence)


class Watched:
    """A port whose results are kept.

    Attributes:
        results: of each Linear, by its index and the block's first row, those of the newest step.
    """

    def __init__(self, port: LinearsPort, slots: Slots) -> None:
        self._port = port
        self._slots = slots
        self.results: dict[tuple[int, int], np.ndarray] = {}

    def apply(self, linear: Linear, block: Block, x: Slot, out: Slot) -> Task:
        yield from self._port.apply(linear, block, x, out)
        rows = self._slots.view(out, block.first_row, block.rows)
        self.results[linear.index, block.first_row] = rows.copy()


class Built:
    """An engine of this process, with what its ports are made of chosen.

    Args:
        linears: "native", "numpy", or "checked": multiplied in the field, by other code, and checked.
    """

    def __init__(
        self,
        folder: Path,
        linears: str = "native",
        element: str = "bfloat16",
        first_bound: int = field_reference.TWO_DIGITS,
        limits: Limits = LIMITS,
    ) -> None:
        network = Network.of(ModelSpec.from_folder(folder))
        if linears == "checked":
            limits = replace(limits, mode="verified")
        plan = Plan.derive(network, limits)
        self.slots = Slots(plan, SimpleNamespace(buffer=mmap.mmap(-1, plan.total_bytes)) if plan.shared_slots else None)
        wait, begin = pytest.fail, lambda verification, step: None
        with Checkpoint.open(folder) as checkpoint:
            ops = Operations(network, NormWeights.load(network, checkpoint), self.slots, Statistics())
            if linears == "numpy":
                kind = np.int64 if network.parameters < 1 << 20 else np.float64
                port = NumpyLinears(network, checkpoint, self.slots, first_bound, kind)
            else:
                loaded = [load_field_linear(checkpoint, linear) for linear in network.linears]
                port = LocalLinears(loaded, ops, lambda: None)
            if linears == "checked":
                queue = MultipliesWhenWaitedFor(loaded, self.slots)
                checks = [_native.FieldCheck(linear, secret_vectors(linear)) for linear in loaded]
                port = FieldLinears(plan, checks, queue, ops)
                wait, begin = queue.wait, port.begin
            of = network.embedding
            embedding = PrivateEmbedding(checkpoint.tensor(of.weight, (of.rows, of.size)), ops)
        self.linears = port = Watched(port, self.slots)
        attention = PrivateAttention(plan, port, ops, private_caches(network, plan, element))
        ports = Ports(embedding, attention, port, wait=wait, begin=begin)
        self.engine = Engine(network, plan, ops, ports)

    def logits(self, *chunks: Chunk) -> np.ndarray:
        """Of all wanted rows."""
        rows: list[np.ndarray] = []
        self.engine.forward(chunks, lambda first, logits: logits.map(lambda found: rows.append(found.copy())))
        return np.concatenate(rows)
