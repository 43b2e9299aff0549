"""Copy bandwidth between an arena and a CUDA device, for each way of pinning, beside what the bus gives.

A process of its own (`python -m tsqp_shm.bench.latency.copies SIZE RUNS`), as it needs torch; prints one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tsqp_shm.config import PINNINGS
from tsqp_shm.errors import DeviceError
from tsqp_shm.printable import print_json
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan, Slot, SlotShape
from tsqp_shm.shm.posix.session import Session

TIMEOUT_S = 120.0
SIZE_BYTES = 64 << 20
RUNS = 20
# Pinned memory of torch's own, copied as it is.
BUS = "bus"


def measured_copies(size_bytes: int = SIZE_BYTES, runs: int = RUNS) -> dict[str, Any]:
    """Returns "rows" (way, direction, bytes, gb_per_s, share_of_bus), none where there is no device, "refused" (way to
    reason), and "reason" why nothing was measured."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"rows": [], "refused": {}, "reason": "no CUDA driver"}
    command = [sys.executable, "-m", __name__, str(size_bytes), str(runs)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"rows": [], "refused": {}, "reason": f"no answer after {TIMEOUT_S:.0f} s"}
    if child.returncode != 0:
        return {"rows": [], "refused": {}, "reason": (child.stderr.strip().splitlines() or ["it ended"])[-1]}
    answer: dict[str, Any] = json.loads(child.stdout)
    return answer


def compare_copies(devices: dict[str, Any], slot: Slot, runs: int) -> list[dict[str, Any]]:
    """One row for each device and direction, in the order of the names: medians of copies that took turns.

    Args:
        devices: the `gpu.device.Device` of each way; the one named "bus" is what the others are held against.
    """
    shape = (slot.num_rows * slot.row_elements,)

    def copy_in(device: Any) -> None:
        device.input(slot, 0, shape)
        _wait(device.finish())

    def copy_out(device: Any) -> None:
        device.output(slot, 0, shape)
        _wait(device.finish())

    directions: dict[str, Callable[[Any], None]] = {"to the device": copy_in, "from the device": copy_out}
    taken_s: dict[tuple[str, str], list[float]] = {}
    for _ in range(runs + 1):
        for name, device in devices.items():
            for direction, copy in directions.items():
                started = time.perf_counter()
                copy(device)
                taken_s.setdefault((name, direction), []).append(time.perf_counter() - started)
    # The first of each warms up.
    rate = {key: slot.size_bytes / statistics.median(values[1:]) / 1e9 for key, values in taken_s.items()}
    return [
        {
            "way": name,
            "direction": direction,
            "bytes": slot.size_bytes,
            "gb_per_s": gb_per_s,
            "share_of_bus": gb_per_s / rate[BUS, direction],
        }
        for (name, direction), gb_per_s in rate.items()
    ]


def _wait(delivery: Any) -> None:
    while not delivery.is_complete():
        pass


def main(size_bytes: int, runs: int) -> None:
    import torch

    from tsqp_shm.gpu.cuda_device import CudaDelivery, CudaDevice
    from tsqp_shm.gpu.open_device import resolve_device

    torch_device = resolve_device("cuda")
    plan = Plan.of_slots([SlotShape("copied", "bfloat16", 1, size_bytes // 2)])
    refused: dict[str, str] = {}
    devices: dict[str, Any] = {}

    class Bus:
        """Torch's own pinned memory and the device's, with nothing in between."""

        def __init__(self) -> None:
            elements, dtype = plan.slots[0].row_elements, torch.bfloat16
            self._host = torch.zeros(elements, dtype=dtype, pin_memory=True)
            self._twin = torch.zeros(elements, dtype=dtype, device=torch_device)

        def input(self, *part: object) -> None:
            self._twin.copy_(self._host, non_blocking=True)

        def output(self, *part: object) -> None:
            self._host.copy_(self._twin, non_blocking=True)

        def finish(self) -> CudaDelivery:
            return CudaDelivery(torch.cuda.current_stream(torch_device).record_event(), [])

    with ExitStack() as stack:
        for way in PINNINGS[1:]:
            # An arena each: what is registered once is pinned for every way.
            session = stack.enter_context(Session.begin(f"bench-copies-{way}-{os.getpid()}"))
            arena = stack.enter_context(Arena.create(session.create_memory(plan.total_bytes), plan, 1))
            try:
                device = CudaDevice(torch_device, arena, way)
            except DeviceError as error:
                refused[way] = str(error)
                continue
            stack.callback(device.close)
            device.reserve(0, 0)
            devices[way] = device
        rows = compare_copies({**devices, BUS: Bus()}, plan.slots[0], runs)
    print_json({"rows": rows, "refused": refused, "reason": ""})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
