"""A CUDA device: slots have device copies there, and copies run beside the arithmetic on streams of their own.

    copies in     slot -> device copy           one operation's rows while the one before computes
    compute       device copy -> device copy    waits for the copies in that it needs
    copies out    device copy -> slot           while the next operation computes; its event completes the operation

No operation waits on the host. Nor do streams wait for each other beyond these: that rows of a device copy are not
overwritten too early follows from whose the slot's rows are. The TEE process writes rows again, or names them as a
result again, only when the operation that had them is complete, with one exception: a score slot may be the result of
a SCORES behind the CONTEXT that reads it, and both are arithmetic, in the order of one stream. A TEE process that
breaks this rule gets wrong numbers of its own.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from tsqp_shm.gpu.device import TORCH_DTYPES, Delivery, Device, part_of, require_memory, slots_size_bytes
from tsqp_shm.gpu.pinning import CudaDriver, choose_pinning
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Slot


class _Result(NamedTuple):
    """What an operation writes: a part of a device copy, of the slot it goes to, and in between of staging memory."""

    device_copy: torch.Tensor
    staging: torch.Tensor | None
    slot_part: torch.Tensor


class CudaDevice(Device):
    """Shapes: a slot's device copy and its staging memory have its elements, flat."""

    def __init__(self, torch_device: torch.device, arena: Arena, pinning: str) -> None:
        super().__init__(torch_device, arena)
        torch.cuda.set_device(torch_device)
        # Sums of a product in bfloat16 would be rounded where the device splits them.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # Also makes the context that the driver is asked in.
        self._compute = torch.cuda.current_stream(torch_device)
        self._copies_in: torch.cuda.Stream = torch.cuda.Stream(torch_device)  # type: ignore[no-untyped-call]
        self._copies_out: torch.cuda.Stream = torch.cuda.Stream(torch_device)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(torch_device)
        self._results: list[_Result] = []
        self._device_copies: dict[int, torch.Tensor] = {}
        self._staging: dict[int, torch.Tensor] = {}
        self._driver = CudaDriver()
        first = arena.plan.slots[0]
        self._arena_address = self._slots[first.index].data_ptr() - first.offset_bytes
        # Last: who fails after it would leave the arena registered.
        chosen = choose_pinning(pinning, self._driver, self.name, self._arena_address, arena.plan.total_bytes)
        self.transfer, self.transfer_reason = chosen.way, chosen.reason

    def reserve(self, weights_bytes: int, cache_bytes: int) -> None:
        plan = self._arena.plan
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        require_memory(self.name, free_bytes, weights_bytes, cache_bytes, slots_size_bytes(plan))
        for slot in plan.shared_slots:
            elements, dtype = slot.num_rows * slot.row_elements, TORCH_DTYPES[slot.dtype]
            self._device_copies[slot.index] = torch.empty(elements, dtype=dtype, device=self.torch_device)
            if self.transfer == "staged":
                self._staging[slot.index] = torch.empty(elements, dtype=dtype, pin_memory=True)

    def input(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        source = self.host(slot, offset_elements, shape)
        if self._staging:
            source = part_of(self._staging[slot.index], offset_elements, shape).copy_(source)
        device_copy = part_of(self._device_copies[slot.index], offset_elements, shape)
        with torch.cuda.stream(self._copies_in):
            device_copy.copy_(source, non_blocking=True)
        self._compute.wait_stream(self._copies_in)
        return device_copy

    def output(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        device_copy = part_of(self._device_copies[slot.index], offset_elements, shape)
        staging = part_of(self._staging[slot.index], offset_elements, shape) if self._staging else None
        self._results.append(_Result(device_copy, staging, self.host(slot, offset_elements, shape)))
        return device_copy

    def finish(self) -> Delivery:
        results, self._results = self._results, []
        if not results:
            return CudaDelivery(self._compute.record_event(), [])
        self._copies_out.wait_stream(self._compute)
        with torch.cuda.stream(self._copies_out):
            for device_copy, staging, slot_part in results:
                (slot_part if staging is None else staging).copy_(device_copy, non_blocking=True)
        return CudaDelivery(self._copies_out.record_event(), results)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def close(self) -> None:
        # A device that was lost says so again; what is to be let go of is let go of all the same.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self.torch_device)
        if self.transfer == "registered":
            # Before the arena is unmapped: the driver holds its pages.
            self._driver.unregister(self._arena_address)
        super().close()


class CudaDelivery:
    """Complete with its event, and when what was staged is in the slots."""

    def __init__(self, event: torch.cuda.Event, results: list[_Result]) -> None:
        self._event = event
        self._results = results

    def is_complete(self) -> bool:
        if not self._event.query():  # type: ignore[no-untyped-call]
            return False
        for _, staging, slot_part in self._results:
            if staging is not None:
                slot_part.copy_(staging)
        return True
