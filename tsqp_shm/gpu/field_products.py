"""Modes `verified` and `blinded`: of every Linear y = m W mod p, p = 2^31 - 1, exactly; the TEE checks each
and does all the rest.

m and y cross as uint32. How many digits a row of m takes is found by centring it.
"""

from __future__ import annotations

import mmap
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tsqp_shm import _native
from tsqp_shm.gpu.device import Device, rows_of
from tsqp_shm.gpu.field_backends import Backend, choose_backend
from tsqp_shm.gpu.field_digits import DigitRows, digits_of_rows
from tsqp_shm.gpu.field_self_test import require_exact
from tsqp_shm.gpu.loading import DeviceMemory, Loaded, Progress
from tsqp_shm.model.digest import LinearsDigest
from tsqp_shm.model.field_weights import load_field_linear, packed_bytes
from tsqp_shm.model.network import Linear, Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.layout import DTYPES, PAGE_BYTES
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import Opcode, Record


class FieldProducts(Protocol):
    """Attributes:
    arithmetic: for people.
    """

    @property
    def arithmetic(self) -> str: ...

    def weight_bytes(self, linear: Linear) -> int:
        """What its weights take on the device."""

    def add(self, loaded: _native.FieldLinear, linear: Linear) -> None:
        """Takes the next Linear of the network."""

    def linear(self, record: Record) -> None:
        """m [T, inputs] u32, of any words -> y [T, outputs] u32, in [0, p), by the Linear that the record names."""

    def multiply(self, weight: NDArray[np.int8], m: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """The same of a weight that is no Linear's, for who wants to know whether it is exact."""


def memory(network: Network, plan: Plan, device: Device) -> DeviceMemory:
    products = _products(plan, device)
    return DeviceMemory(products.arithmetic, sum(map(products.weight_bytes, network.linears)), 0)


def load(network: Network, plan: Plan, checkpoint: Checkpoint, device: Device, progress: Progress) -> Loaded:
    """Raises:
    DeviceError: the device's products are not exact.
    ModelFileError: a tensor is missing, has another shape, or its file was truncated.
    UnsupportedModel: a Linear has more inputs than a product can sum, or a weight is no finite number.
    """
    products = _products(plan, device)
    require_exact(device.name, products.multiply, (linear.inputs for linear in network.linears))
    digest = LinearsDigest()
    per_layer = len(network.layers[0].linears)
    for linear in network.linears:
        loaded = load_field_linear(checkpoint, linear)
        digest.add(linear, loaded)
        products.add(loaded, linear)
        progress(min(linear.index // per_layer, network.num_layers), network.num_layers)
    return Loaded({Opcode.LINEAR: products.linear}, digest.value)


def _products(plan: Plan, device: Device) -> FieldProducts:
    """The fastest for this device."""
    if device.transfer == "in place":
        return NativeFieldProducts(device)
    return TorchFieldProducts(plan, device, choose_backend(device.torch_device))


class NativeFieldProducts:
    """On the slots themselves, by `native/field`."""

    def __init__(self, device: Device) -> None:
        self.arithmetic = f"int8, {_native.field_instruction_set()}"
        self._slots = device.slot_table()
        self._linears: list[_native.FieldLinear] = []

    def weight_bytes(self, linear: Linear) -> int:
        return sum(packed_bytes(linear))

    def add(self, loaded: _native.FieldLinear, linear: Linear) -> None:
        self._linears.append(loaded)

    def linear(self, record: Record) -> None:
        self._linears[record.target].multiply(
            self._slots, record.in_slot, record.out_slot, record.first_row, record.rows
        )

    def multiply(self, weight: NDArray[np.int8], m: NDArray[np.uint32]) -> NDArray[np.uint32]:
        linear = _native.FieldLinear(*weight.shape)
        linear.set_rows(0, weight.astype(np.float32))
        outputs, code = len(weight), DTYPES["uint32"].code
        y_offset = -(-m.nbytes // PAGE_BYTES) * PAGE_BYTES
        # Ends with a whole page.
        memory = mmap.mmap(-1, y_offset + -(-len(m) * outputs * m.itemsize // PAGE_BYTES) * PAGE_BYTES)
        memory[: m.nbytes] = m.tobytes()
        entries = [(0, *m.shape, code), (y_offset, len(m), outputs, code)]
        slots = _native.SlotTable(None, [], memory, entries)
        linear.multiply(slots, 0, 1, 0, len(m))
        return np.frombuffer(memory, np.uint32, len(m) * outputs, y_offset).reshape(len(m), outputs)


class TorchFieldProducts:
    """On a device that slots are copied to: by digits, with the products that it has fast."""

    def __init__(self, plan: Plan, device: Device, backend: Backend) -> None:
        self.arithmetic = backend.arithmetic
        self._slots = plan.slots
        self._device = device
        self._backend = backend
        self._linears: list[tuple[torch.Tensor, int]] = []

    def weight_bytes(self, linear: Linear) -> int:
        return self._backend.weight_bytes(linear.outputs, linear.inputs)

    def add(self, loaded: _native.FieldLinear, linear: Linear) -> None:
        self._linears.append((self._pack(loaded.quantised(0, linear.outputs)), linear.outputs))

    def linear(self, record: Record) -> None:
        in_slot, out_slot = self._slots[record.in_slot], self._slots[record.out_slot]
        in_rows = rows_of(in_slot, record.first_row, record.rows)
        counts = digits_of_rows(self._device.host(in_slot, *in_rows))
        m = self._device.input(in_slot, *in_rows)
        y = self._device.output(out_slot, *rows_of(out_slot, record.first_row, record.rows))
        y.view(torch.int32).copy_(self._product(m, counts, *self._linears[record.target]))

    def multiply(self, weight: NDArray[np.int8], m: NDArray[np.uint32]) -> NDArray[np.uint32]:
        words = torch.from_numpy(m)
        y = self._product(words.to(self._device.torch_device), digits_of_rows(words), self._pack(weight), len(weight))
        return y.to(torch.int32).cpu().numpy().view(np.uint32)

    def _pack(self, weight: NDArray[np.int8]) -> torch.Tensor:
        return self._backend.pack(torch.from_numpy(weight).to(self._device.torch_device))

    def _product(self, m: torch.Tensor, counts: list[int], packed: torch.Tensor, outputs: int) -> torch.Tensor:
        """Shapes: m [R, K] uint32 -> [R, N] int64, in [0, p)."""
        rows = DigitRows(m, counts)
        return rows.combine(self._backend.sums(rows.digits, packed, outputs))
