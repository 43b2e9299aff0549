"""torch.cuda as far as `gpu.cuda_device` uses it, on the CPU: so that its code runs where there is no device.

What is computed is computed at once, whatever stream it is on; streams note what they are told to wait for, and events
come late. That the order is one in which a device would compute the same is for the notes to show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tsqp_shm.gpu import cuda_device
from tsqp_shm.gpu.cuda_device import CudaDevice
from tsqp_shm.shm.arena import Arena


class Event:
    def __init__(self, looks: int = 3) -> None:
        self._looks = looks

    def query(self) -> bool:
        self._looks -= 1
        return self._looks < 0


class PretendedCuda:
    """Attributes:
    notes: what streams did, in its order: "copies in: copy", "compute: waits for copies in", "copies out: event".
    registered: whether the arena is registered with the driver.
    free_bytes: of the device's memory.
    capability: of its arithmetic; by default a card's that has int8 fast.
    """

    def __init__(self, refusal: str = "", free_bytes: int = 1 << 40, capability: tuple[int, int] = (9, 0)) -> None:
        self.notes: list[str] = []
        self.registered = False
        self.free_bytes = free_bytes
        self.capability = capability
        self._refusal = refusal
        self._current = "compute"
        names = iter(("copies in", "copies out"))
        cuda, this = self, "compute"

        class Stream:
            def __init__(self, device: torch.device, name: str | None = None) -> None:
                self.name = name or next(names)

            def wait_stream(self, other: Stream) -> None:
                cuda.notes.append(f"{self.name}: waits for {other.name}")

            def record_event(self) -> Event:
                cuda.notes.append(f"{self.name}: event")
                return Event()

        self.stream_class = Stream
        self._compute = Stream(torch.device("cpu"), this)

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_empty, real_copy = torch.empty, torch.Tensor.copy_

        def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            return real_empty(*shape, **options)

        def copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if non_blocking:
                self.notes.append(f"{self._current}: copy")
            return real_copy(to, source)

        @contextlib.contextmanager
        def stream(chosen: Any) -> Iterator[None]:
            before, self._current = self._current, chosen.name
            yield
            self._current = before

        for name, replacement in {
            "set_device": lambda device: None,
            "synchronize": lambda device: None,
            "current_stream": lambda device: self._compute,
            "Stream": self.stream_class,
            "stream": stream,
            "mem_get_info": lambda device: (self.free_bytes, 1 << 40),
            "get_device_capability": lambda device: self.capability,
        }.items():
            monkeypatch.setattr(torch.cuda, name, replacement)
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        monkeypatch.setattr(cuda_device, "CudaDriver", lambda: self)

    def open(self, arena: Arena, way: str) -> CudaDevice:
        return CudaDevice(torch.device("cpu"), arena, way)

    def register(self, address: int, size_bytes: int) -> str:
        self.registered = not self._refusal
        return self._refusal

    def unregister(self, address: int) -> None:
        self.registered = False

    def pinned_refusal(self) -> str:
        return ""
