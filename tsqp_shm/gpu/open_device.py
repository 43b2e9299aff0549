"""Which device a name means on this machine, and that device with an arena's slots."""

from __future__ import annotations

import torch

from tsqp_shm.errors import ConfigError, DeviceError
from tsqp_shm.gpu.cuda_device import CudaDevice
from tsqp_shm.gpu.device import Device
from tsqp_shm.shm.arena import Arena


def open_device(name: str, pinning: str, arena: Arena) -> Device:
    """The device of that name, with the arena's slots.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        pinning: "auto", "registered", "staged" or "pageable".

    Raises:
        DeviceError: it is not there, or does not do what `pinning` asks.
        ConfigError: a way of pinning for the CPU.
    """
    torch_device = resolve_device(name)
    if torch_device.type == "cpu":
        if pinning != "auto":
            raise ConfigError("pinning", pinning, "auto: on the CPU slots are used in place and nothing is pinned")
        return Device(torch_device, arena)
    return CudaDevice(torch_device, arena, pinning)


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
