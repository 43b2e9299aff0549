"""What the forecast takes from this machine: measured once before the contenders start, and on what they did."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import numpy as np

from tsqp_shm import _native
from tsqp_shm.bench import _blinded_checks, _field_checks, _field_products, _pads
from tsqp_shm.bench.modes.forecast import Costs, Machine, ModelShape, Work
from tsqp_shm.errors import TsqpError

# The modes whose runs the forecast is made with.
FORECAST_BY = ("verified", "tee-only")
# Outputs and inputs of the Linear that is measured with: as wide as those of a model of 8 thousand million weights.
_WIDTH = 4096
_VECTORS = 2
_ROWS = 64
_PAD_ROWS = 384
# More than caches hold.
_COPIES = 6
_STOCK_ROWS = 4096
_TIMES = 4
_BYTES_BETWEEN = 2 << 20
_ROUNDS = 3
_LONGEST_S = 60.0
_LOOK_S = 0.001


class Calibration(NamedTuple):
    """Units: nanoseconds a word of m or y and core; bytes and multiplications a second, of all cores and of one.

    Attributes:
        memory_bytes_per_s: int8 weights by one row of two digits.
        digit_macs_per_s: of one core.
        pad_macs_per_s: of one core, draws included.
    """

    memory_bytes_per_s: float
    digit_macs_per_s: float
    check_ns: float
    lone_check_ns: float
    pad_ns: float
    pad_macs_per_s: float


def calibrate(cores: int) -> Calibration:
    """Takes two or three seconds of all cores.

    Raises:
        RuntimeError: the machine has neither VPDPBUSD nor TDPBUSD.
    """
    _field_products.set_num_threads(cores, 200)
    few = _field_products.FieldProducts(_WIDTH, _WIDTH, _COPIES)
    one_row_s = min(sum(few.products(1, 2)) for _ in range(_ROUNDS))
    many_s = min(sum(few.products(4 * _ROWS, 2)) for _ in range(_ROUNDS))
    multiplications = 2 * 4 * _ROWS * _WIDTH * _WIDTH * _COPIES
    _field_products.set_num_threads(1)
    _field_checks.set_num_threads(1)
    return Calibration(
        memory_bytes_per_s=few.num_bytes / one_row_s,
        digit_macs_per_s=multiplications / many_s / cores,
        check_ns=_check_ns(_ROWS),
        lone_check_ns=_check_ns(1),
        pad_ns=_pad_ns(),
        pad_macs_per_s=_pad_macs_per_s(cores),
    )


def _check_ns(rows: int) -> float:
    """A lone row's vectors are asked for while its product is waited for, as a session does it."""
    checks = _field_checks.FieldChecks(_WIDTH, _WIDTH, _VECTORS, rows, _COPIES, _BYTES_BETWEEN)
    seconds = [np.add(*checks.seconds(rows == 1)) for _ in range(2 * _ROUNDS)]
    return float(np.median(seconds)) * 1e9 / rows / (2 * _WIDTH)


def _pad_ns() -> float:
    """Of words of m and y in equal parts: the one drawn and masked, the other made up for with what memory brings."""
    rows = _pads.PadRows(_pads.kernel_names()[-1], _WIDTH, _ROWS)
    mask_s = statistics.median(rows.mask(1) for _ in range(2 * _ROUNDS))
    checks = _blinded_checks.BlindedChecks(_WIDTH, _WIDTH, _ROWS, _STOCK_ROWS)
    more_s = [checks.finish(_TIMES, True) - checks.finish(_TIMES, False) for _ in range(2 * _ROUNDS)]
    unmask_s = max(0.0, statistics.median(more_s) / _TIMES)
    return (mask_s + unmask_s) * 1e9 / _ROWS / (2 * _WIDTH)


def _pad_macs_per_s(cores: int) -> float:
    linear = _native.FieldLinear(_WIDTH, _WIDTH)
    linear.set_rows(0, np.random.default_rng(0).standard_normal((_WIDTH, _WIDTH), np.float32))
    # A Linear each, as one's pads are made by one thread at a time.
    linears = [linear] * cores
    begun = time.perf_counter()
    stock = _native.PadStock(_native.PadKeys(b"bench", b"", 0, cores), linears, _PAD_ROWS, cores)
    try:
        while stock.available < _PAD_ROWS:
            if stock.fault is not None or time.perf_counter() - begun > _LONGEST_S:
                raise TsqpError(f"pads are not made: {stock.fault or 'they take too long'}")
            time.sleep(_LOOK_S)
        return float(stock.made) * _WIDTH * _WIDTH / (time.perf_counter() - begun) / cores
    finally:
        stock.close()


def costs_of(calibration: Calibration, rows: list[dict[str, Any]], shape: ModelShape, threads: int) -> Costs:
    """With how fast attention was in a prompt of `tee-only`, on so many threads."""
    (row,) = [row for row in rows if row["case"] == "prefill" and row["mode"] == "tee-only"]
    operations = Work(row["prompt_tokens"]).attention_operations(shape)
    return Costs(
        check_ns=calibration.check_ns,
        lone_check_ns=calibration.lone_check_ns,
        pad_ns=calibration.pad_ns,
        digit_macs_per_s=calibration.digit_macs_per_s,
        pad_macs_per_s=calibration.pad_macs_per_s,
        attention_flops_per_s=operations / seconds_of(row, "tee", "ATTENTION") / threads,
    )


def this_machine(
    calibration: Calibration, rows: list[dict[str, Any]], shape: ModelShape, cores: int, tee_cores: int
) -> Machine:
    """With a GPU process as it was in `verified`."""
    found = {row["case"]: row for row in rows if row["mode"] == "verified"}
    prefill, decode = found["prefill"], found["decode"]
    multiplications = 2 * Work(prefill["prompt_tokens"]).multiplications(shape)
    on_cores = prefill["device"] == "cpu"
    return Machine(
        name="here",
        cores=cores,
        memory_bytes_per_s=calibration.memory_bytes_per_s,
        gpu="this GPU process",
        gpu_bytes=float("inf"),
        gpu_bytes_per_s=shape.weights / seconds_of(decode, "gpu"),
        gpu_macs_per_s=multiplications / seconds_of(prefill, "gpu"),
        # A slot is where the other side reads it; on a CUDA device copies are among its operations.
        bus_bytes_per_s=float("inf"),
        round_trip_s=decode["round_trip_us"] * 1e-6,
        tee_cores=tee_cores,
        gpu_cores=cores if on_cores else 0,
    )


def seconds_of(row: dict[str, Any], side: str, operation: str | None = None) -> float:
    """Of a row's unit, that a side took for an operation; None: for all."""
    return sum(
        float(each["total_s"])
        for each in row["operations"]
        if each["side"] == side and operation in (None, each["operation"])
    )
