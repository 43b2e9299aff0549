"""A device that is to the worker what CUDA is, on the CPU: slots have device copies, and results arrive late.

A result leaves its device copy as late as it may, when its delivery is complete; what later operations have done to the
copy by then would be seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsqp_shm.gpu.device import Device, part_of
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Slot


class _Result(NamedTuple):
    device_copy: torch.Tensor
    slot_part: torch.Tensor


class LateDevice(Device):
    """Attributes:
    looks: how often a delivery is looked at in vain before it is complete.
    most_running: of the operations whose delivery was not complete, the most there were.
    failure: raised by the delivery of the operation after so many that still work: (count, error).
    """

    def __init__(self, arena: Arena, looks: int = 3, failure: tuple[int, Exception] | None = None) -> None:
        super().__init__(torch.device("cpu"), arena)
        self.looks, self.most_running = looks, 0
        self._failure = failure
        self._begun = self._running = 0
        self._device_copies = {index: torch.full_like(slot, 99) for index, slot in self._slots.items()}
        self._results: list[_Result] = []

    def input(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        device_copy = part_of(self._device_copies[slot.index], offset_elements, shape)
        return device_copy.copy_(self.host(slot, offset_elements, shape))

    def output(self, slot: Slot, offset_elements: int, shape: tuple[int, ...]) -> torch.Tensor:
        device_copy = part_of(self._device_copies[slot.index], offset_elements, shape)
        self._results.append(_Result(device_copy, self.host(slot, offset_elements, shape)))
        return device_copy

    def finish(self) -> LateDelivery:
        self._begun += 1
        self._running += 1
        self.most_running = max(self.most_running, self._running)
        results, self._results = self._results, []
        failure = self._failure[1] if self._failure and self._begun > self._failure[0] else None
        return LateDelivery(self, results, failure)

    def delivered(self) -> None:
        self._running -= 1


class LateDelivery:
    def __init__(self, device: LateDevice, results: list[_Result], failure: Exception | None) -> None:
        self._device = device
        self._results = results
        self._failure = failure
        self._looks = 0

    def is_complete(self) -> bool:
        self._looks += 1
        if self._looks <= self._device.looks:
            return False
        if self._failure is not None:
            raise self._failure
        for device_copy, slot_part in self._results:
            slot_part.copy_(device_copy)
        self._device.delivered()
        return True
