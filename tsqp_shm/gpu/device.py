"""Where the GPU process computes, and how a slot's rows get there and back.

On the CPU a slot is the tensor computed on. On CUDA (`gpu.cuda_device`) a slot has a copy on the device: rows are
copied in before an operation and out after it. Everything else is the same code.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch

from tsqp_shm import _native
from tsqp_shm.errors import DeviceError
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan, Slot
from tsqp_shm.shm.slots import slot_array, slot_table

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in layout.DTYPES}


class Delivery(Protocol):
    """An operation's results on their way to their slots."""

    def is_complete(self) -> bool:
        """Looks without waiting; True: they are there, and what the operation read may be written again.

        Raises:
            RuntimeError: the device failed.
        """


class Delivered:
    """They are there: the operation wrote to the slots themselves."""

    def is_complete(self) -> bool:
        return True


_DELIVERED = Delivered()


class Device:
    """The CPU: operations read and write the slots in place.

    Attributes:
        transfer: "in place", or the way of `gpu.pinning`.
        transfer_reason: why it is no better one.
    """

    def __init__(self, torch_device: torch.device, arena: Arena) -> None:
        self.torch_device = torch_device
        self.transfer = "in place"
        self.transfer_reason = ""
        self._arena = arena
        self._table: _native.SlotTable | None = None
        self._slots = {slot.index: _slot_tensor(arena, slot) for slot in arena.plan.shared_slots}

    @property
    def name(self) -> str:
        return str(self.torch_device)

    def reserve(self, weights_bytes: int, cache_bytes: int) -> None:
        """Takes what the slots need on the device. To be called before anything is loaded.

        Raises:
            DeviceError: slots, weights and cache cannot fit, with the figures.
        """

    def host(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A part of the slot itself, for who looks at it here. Shapes: dense, from an element of the slot on."""
        return part_of(self._slots[slot.index], offset_elements, shape)

    def input(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        """What the TEE wrote, as a tensor on the device. Shapes: as `host`."""
        return self.host(slot, offset_elements, shape)

    def output(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor on the device to write a result to; it is in the slot when its delivery is complete."""
        return self.host(slot, offset_elements, shape)

    def finish(self) -> Delivery:
        """Ends an operation: sends its results on their way. The next may begin before they have arrived."""
        return _DELIVERED

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed memory on the device; on the CPU its pages cost nothing until they are used."""
        # torch.zeros writes the zeros; numpy's come from the kernel, page by page, when first touched.
        size_bytes = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(np.zeros(size_bytes, np.uint8)).view(dtype).view(shape)

    def slot_table(self) -> _native.SlotTable:
        """The arena's slots for native code that computes in place; held until `close`."""
        self._table = self._table or slot_table(self._arena)
        return self._table

    def close(self) -> None:
        """Drops every view of the arena."""
        if self._table is not None:
            self._table.release()
        self._slots.clear()


def part_of(flat: torch.Tensor, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A dense part of a slot's elements, as a view."""
    return flat[offset_elements : offset_elements + math.prod(shape)].view(shape)


def rows_of(slot: Slot, first_row: int, rows: int) -> tuple[int, tuple[int, int]]:
    """Where in a slot rows of it begin, and their shape."""
    return first_row * slot.row_elements, (rows, slot.row_elements)


def require_memory(device: str, free_bytes: int, weights_bytes: int, cache_bytes: int, slots_bytes: int) -> None:
    """Raises:
    DeviceError: they need more than is free, with the figures and what to lower.
    """
    needed_bytes = weights_bytes + cache_bytes + slots_bytes
    if needed_bytes <= free_bytes:
        return
    if weights_bytes > free_bytes:
        remedy = "a smaller model or a larger device is needed"
    else:
        of_cache = ["--max-model-len or --max-num-seqs"] if cache_bytes else []
        remedy = "lower " + ", ".join(of_cache + ["--max-batch-tokens"] * (slots_bytes > cache_bytes))
    raise DeviceError(
        device,
        f"{needed_bytes:,} bytes of its memory are needed (weights {weights_bytes:,}, cache {cache_bytes:,}, slots "
        f"{slots_bytes:,}) and {free_bytes:,} are free; {remedy}",
    )


def slots_size_bytes(plan: Plan) -> int:
    return sum(slot.size_bytes for slot in plan.shared_slots)


def _slot_tensor(arena: Arena, slot: Slot) -> torch.Tensor:
    # SAFETY: torch.frombuffer would not hold the mapping; numpy's array does, and torch holds the array.
    tensor = torch.from_numpy(slot_array(arena, slot)).flatten()
    return tensor.view(torch.bfloat16) if slot.dtype == "bfloat16" else tensor
