"""How a CUDA device reaches the arena: registered with the driver, staged through pinned memory, or pageable."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch

from tsqp_shm.errors import DeviceError

# CUDA_ERROR_NOT_SUPPORTED is what a device in confidential-computing mode answers.
_PORTABLE, _DEVICE_MAP = 1, 2


@dataclass(frozen=True)
class Pinning:
    """Attributes:
    way: "registered": copies go between the arena and the device. "staged": through pinned memory between the two,
        which the processor copies to and from. "pageable": the driver stages by itself, and a copy out is waited for.
    reason: why no better one, or that it was asked for; empty for what is best.
    """

    way: str
    reason: str = ""


class Driver(Protocol):
    """What is asked of the CUDA driver; `CudaDriver` asks it."""

    def register(self, address: int, size_bytes: int) -> str:
        """Pins pages that are mapped already. Returns why it cannot be done, or nothing."""

    def unregister(self, address: int) -> None:
        """Lets go of them; to be called before they are unmapped."""

    def pinned_refusal(self) -> str:
        """Why no pinned memory is to be had, or nothing."""


def choose_pinning(wanted: str, driver: Driver, device: str, address: int, size_bytes: int) -> Pinning:
    """The best way that the driver allows, or the one that is wanted.

    Args:
        wanted: "auto", or one of the ways.
        address, size_bytes: of the arena. After "registered" it stays registered until `Driver.unregister`.

    Raises:
        DeviceError: the way that is wanted cannot be had.
    """
    if wanted == "pageable":
        return Pinning(wanted, "as asked")
    refusals = []
    if wanted in ("auto", "registered"):
        refusal = driver.register(address, size_bytes)
        if not refusal:
            return Pinning("registered")
        refusals.append(refusal)
    if wanted in ("auto", "staged"):
        refusal = driver.pinned_refusal()
        if not refusal:
            return Pinning("staged", refusals[0] if refusals else "as asked")
        refusals.append(refusal)
    if wanted != "auto":
        raise DeviceError(device, f"--pinning {wanted} cannot be had: {refusals[0]}; --pinning auto takes what can")
    return Pinning("pageable", "; ".join(refusals))


class CudaDriver:
    """The driver's own interface: unlike the runtime's, a refusal leaves no error behind for the next launch to find.

    A context must be current in this thread, as after any use of torch.cuda.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.cuMemHostRegister_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        self._library.cuMemHostUnregister.argtypes = [ctypes.c_void_p]
        self._library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]

    def register(self, address: int, size_bytes: int) -> str:
        error = self._library.cuMemHostRegister_v2(address, size_bytes, _PORTABLE | _DEVICE_MAP)
        return f"cuMemHostRegister: {self._name(error)}" if error else ""

    def unregister(self, address: int) -> None:
        # Also where the device was lost: then it fails, and the end of the process lets go.
        self._library.cuMemHostUnregister(address)

    def pinned_refusal(self) -> str:
        try:
            torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            return f"no pinned memory: {str(error).splitlines()[0]}"
        return ""

    def _name(self, error: int) -> str:
        name = ctypes.c_char_p()
        self._library.cuGetErrorName(error, ctypes.byref(name))
        return f"{(name.value or b'unknown').decode()} ({error})"
