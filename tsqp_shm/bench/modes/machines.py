"""Machines that the forecast is printed for. Their figures are assumptions: published peaks, and nothing of them was
measured."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from tsqp_shm.bench.modes.forecast import Machine
from tsqp_shm.errors import ConfigError

_GIGA, _TERA = 1e9, 1e12
# A multiplication and an addition are two of the published operations.
_H100_SXM = Machine(
    name="",
    cores=0,
    memory_bytes_per_s=0.0,
    gpu="H100 SXM",
    gpu_bytes=80 * _GIGA,
    gpu_bytes_per_s=3.35 * _TERA,
    gpu_macs_per_s=1979 / 2 * _TERA,
    bus_bytes_per_s=25 * _GIGA,
    round_trip_s=31e-6,
)
# TDPBUSD makes 1,024 multiplications a cycle, here at 2 GHz and half of the time.
_TILES_MACS_PER_S = 1.0 * _TERA

STATED = (
    replace(_H100_SXM, name="A", cores=32, memory_bytes_per_s=200 * _GIGA, digit_macs_per_s=_TILES_MACS_PER_S),
    replace(_H100_SXM, name="B", cores=8, memory_bytes_per_s=60 * _GIGA),
    replace(
        _H100_SXM,
        name="C",
        cores=8,
        memory_bytes_per_s=60 * _GIGA,
        gpu="RTX 4090",
        gpu_bytes=24 * _GIGA,
        gpu_bytes_per_s=1.008 * _TERA,
        gpu_macs_per_s=660.6 / 2 * _TERA,
    ),
)
# What `--assume` calls an attribute, and its unit.
_ASSUMED = {
    "cores": ("cores", 1.0),
    "memory-gb-s": ("memory_bytes_per_s", _GIGA),
    "digit-gmac-s": ("digit_macs_per_s", _GIGA),
    "gpu-gb": ("gpu_bytes", _GIGA),
    "gpu-gb-s": ("gpu_bytes_per_s", _GIGA),
    "gpu-tmac-s": ("gpu_macs_per_s", _TERA),
    "bus-gb-s": ("bus_bytes_per_s", _GIGA),
    "round-trip-us": ("round_trip_s", 1e-6),
}


def assumed(text: str) -> Machine:
    """Machine B, but for what is assumed of it: "cores=16,memory-gb-s=90".

    Raises:
        ConfigError: a name or a value is none.
    """
    machine = replace(STATED[1], name="yours", gpu="GPU")
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in _ASSUMED or not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) or not float(value):
            raise ConfigError("assume", part, f"NAME=X, more than 0, with commas between; {', '.join(_ASSUMED)}")
        attribute, unit = _ASSUMED[name]
        number: Any = int(float(value)) or 1 if attribute == "cores" else float(value) * unit
        machine = replace(machine, **{attribute: number})
    return machine


def in_words(machine: Machine) -> str:
    """All that is assumed of it."""
    of_core = "as these" if machine.digit_macs_per_s is None else f"of {machine.digit_macs_per_s / _GIGA:,.0f} G/s each"
    return (
        f"{machine.cores} cores {of_core}, memory {machine.memory_bytes_per_s / _GIGA:,.0f} GB/s; "
        f"{machine.gpu} {machine.gpu_bytes / _GIGA:,.0f} GB, {machine.gpu_bytes_per_s / _TERA:.2f} TB/s, "
        f"{machine.gpu_macs_per_s / _TERA:,.0f} T/s; bus {machine.bus_bytes_per_s / _GIGA:,.0f} GB/s, "
        f"round trip {machine.round_trip_s * 1e6:,.0f} us"
    )


def as_plain(machine: Machine) -> dict[str, float | int | str | None]:
    return {field.name: getattr(machine, field.name) for field in fields(machine)}
