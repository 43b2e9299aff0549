"""Where the GPU process computes, and how a slot's rows get there and back.

On the CPU a slot is the tensor computed on. On CUDA a slot has a twin on the device: rows are copied in before an
operation and out after it. Everything else is the same code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tsqp_shm import _native
from tsqp_shm.errors import DeviceError
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.slots import slot_array, slot_table

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int32": torch.int32}


class Device:
    """The CPU: operations read and write the slots in place."""

    def __init__(self, torch_device: torch.device, arena: Arena) -> None:
        self.torch_device = torch_device
        self.transfer = "in place"
        self.transfer_reason = ""
        self._arena = arena
        self._table: _native.SlotTable | None = None
        self._slots = {slot.index: _slot_tensor(arena, slot) for slot in arena.plan.slots}

    @property
    def name(self) -> str:
        return str(self.torch_device)

    def input(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        """What the TEE wrote, as a tensor on the device. Shapes: dense, from an element of the slot on."""
        return self._host(slot, offset_elements, shape)

    def output(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor on the device to write a result to; it is in the slot after `finish`."""
        return self._host(slot, offset_elements, shape)

    def finish(self) -> None:
        """Returns when every result of this operation is in its slot."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed memory on the device; on the CPU its pages cost nothing until they are used."""
        # torch.zeros writes the zeros; numpy's come from the kernel, page by page, when first touched.
        size_bytes = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(np.zeros(size_bytes, np.uint8)).view(dtype).view(shape)

    def slot_table(self) -> _native.SlotTable:
        """The arena's slots for native code that computes in place; held until `close`."""
        self._table = self._table or slot_table(self._arena)
        return self._table

    def require_memory(self, weights_bytes: int, cache_bytes: int) -> None:
        """Raises:
        DeviceError: weights and cache cannot fit, with the figures.
        """

    def close(self) -> None:
        """Drops every view of the arena."""
        if self._table is not None:
            self._table.release()
        self._slots.clear()

    def _host(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        flat = self._slots[slot.index]
        return flat[offset_elements : offset_elements + math.prod(shape)].view(shape)


@dataclass
class _Pinning:
    """How the arena is reached from the device. `way`: registered, staged or pageable; `reason`: why no better."""

    way: str
    reason: str = ""


class CudaDevice(Device):
    """A CUDA device: rows are copied between the slot and its twin on one stream."""

    def __init__(self, torch_device: torch.device, arena: Arena) -> None:
        super().__init__(torch_device, arena)
        torch.cuda.set_device(torch_device)
        self._twins = {
            slot.index: torch.empty(
                slot.num_rows * slot.row_elements, dtype=TORCH_DTYPES[slot.dtype], device=torch_device
            )
            for slot in arena.plan.slots
        }
        first = self._slots[0]
        self._arena_address = first.data_ptr() - arena.plan.slots[0].offset_bytes
        self._pinning = _pin(self._arena_address, arena.plan.total_bytes)
        self.transfer = self._pinning.way
        self.transfer_reason = f" ({self._pinning.reason})" if self._pinning.reason else ""
        self._staging: dict[int, torch.Tensor] = {}
        if self._pinning.way == "staged":
            self._staging = {
                index: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                for index, tensor in self._slots.items()
            }
        self._results: list[tuple[Slot, int, tuple[int, ...], torch.Tensor]] = []
        self._copied: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def input(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        source = self._host(slot, offset_elements, shape)
        staging = self._stage(slot, offset_elements, shape)
        if staging is not None:
            source = staging.copy_(source)
        return self._twin(slot, offset_elements, shape).copy_(source, non_blocking=True)

    def output(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        twin = self._twin(slot, offset_elements, shape)
        self._results.append((slot, offset_elements, shape, twin))
        return twin

    def finish(self) -> None:
        for slot, offset_elements, shape, twin in self._results:
            target = self._stage(slot, offset_elements, shape)
            if target is None:
                target = self._host(slot, offset_elements, shape)
            target.copy_(twin, non_blocking=True)
        self._copied.record()
        # The completion may be rung only after the copy's event.
        self._copied.synchronize()
        for slot, offset_elements, shape, _ in self._results:
            staging = self._stage(slot, offset_elements, shape)
            if staging is not None:
                self._host(slot, offset_elements, shape).copy_(staging)
        self._results.clear()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def require_memory(self, weights_bytes: int, cache_bytes: int) -> None:
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        if weights_bytes + cache_bytes > free_bytes:
            raise DeviceError(
                self.name,
                f"weights need {weights_bytes:,} bytes and the cache {cache_bytes:,}, {free_bytes:,} are free; "
                "lower --max-model-len or --max-num-seqs",
            )

    def close(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        if self._pinning.way == "registered":
            # Before the arena is unmapped: the driver holds its pages.
            _cudart().cudaHostUnregister(self._arena_address)
        super().close()

    def _twin(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self._twins[slot.index][offset_elements : offset_elements + math.prod(shape)].view(shape)

    def _stage(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor | None:
        flat = self._staging.get(slot.index)
        return None if flat is None else flat[offset_elements : offset_elements + math.prod(shape)].view(shape)


def open_device(name: str, arena: Arena) -> Device:
    """The device of that name, with the arena's slots.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        DeviceError: it is not there.
    """
    torch_device = resolve_device(name)
    return Device(torch_device, arena) if torch_device.type == "cpu" else CudaDevice(torch_device, arena)


def resolve_device(name: str) -> torch.device:
    """What `name` means on this machine.

    Raises:
        DeviceError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "a driver" if torch.version.cuda else "a torch that is built for CUDA"
        raise DeviceError(name, f"no CUDA device can be used: {built} is missing; use --device cpu")
    device = torch.device(name if ":" in name else "cuda:0")
    if device.index >= torch.cuda.device_count():
        raise DeviceError(name, f"this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def _slot_tensor(arena: Arena, slot: Slot) -> torch.Tensor:
    # SAFETY: torch.frombuffer would not hold the mapping; numpy's array does, and torch holds the array.
    tensor = torch.from_numpy(slot_array(arena, slot)).flatten()
    return tensor.view(torch.bfloat16) if slot.dtype == "bfloat16" else tensor


def _pin(address: int, size_bytes: int) -> _Pinning:
    """Registers the arena with the driver; where that is refused, finds out whether pinned memory is to be had."""
    cudart = _cudart()
    # 2: mapped into the device's address space. Confidential-computing mode refuses with error 801.
    error = int(cudart.cudaHostRegister(address, size_bytes, 2))
    if error == 0:
        return _Pinning("registered")
    reason = f"cudaHostRegister: error {error}"
    _clear_error(cudart)
    try:
        torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        _clear_error(cudart)
        return _Pinning("pageable", f"{reason}; no pinned memory")
    return _Pinning("staged", reason)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _clear_error(cudart: Any) -> None:
    # A refused call stays behind as the last error, and the next kernel launch would report it as its own.
    clear = getattr(cudart, "cudaGetLastError", None)
    if clear is not None:
        clear()
        return
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return
