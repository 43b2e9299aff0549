"""Where each mode pays: the forecast for this machine, beside what was measured, and for others."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from tsqp_shm.bench.modes.forecast import Costs, Forecast, Machine, ModelShape, Work, forecast
from tsqp_shm.bench.modes.machines import STATED, as_plain, in_words
from tsqp_shm.bench.modes.measured import Calibration, costs_of, this_machine
from tsqp_shm.bench.report import Row
from tsqp_shm.bench.shapes import shape_config
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec

_SHAPES = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b")
_PROMPT = Work(1024)
_WORKS = (Work(1, 512), Work(8, 512), Work(64, 512), _PROMPT)
# How a row is called whose mode is forecast.
LABELS = dict(zip(Forecast._fields, ("tee-only", "verified", "blinded stocked", "blinded sustained"), strict=True))


def outlook(
    calibration: Calibration,
    rows: list[Row],
    measured_shape: ModelShape,
    cores: int,
    threads: int,
    of_reader: Machine | None,
) -> dict[str, Any]:
    """As plain values.

    Args:
        threads: of the GPU process and of `tee-only`; the TEE process beside one has half.
        of_reader: a machine that was asked for.
    """
    costs = costs_of(calibration, rows, measured_shape, threads)
    here = this_machine(calibration, rows, measured_shape, cores, max(1, threads // 2))
    machines = [*STATED, *([of_reader] if of_reader else [])]
    return {
        "costs": asdict(costs),
        "here": as_plain(here),
        "beside_measured": _beside_measured(rows, measured_shape, here, costs),
        "machines": [
            {**as_plain(machine), "in_words": in_words(machine), "rows": _of_machine(machine, costs)}
            for machine in machines
        ],
    }


def _beside_measured(rows: list[Row], shape: ModelShape, here: Machine, costs: Costs) -> list[dict[str, Any]]:
    """Every row whose mode is forecast: seconds of its unit, forecast and measured."""
    found = []
    for row in rows:
        fields = [field for field, label in LABELS.items() if label == row["label"]]
        if not fields:
            continue
        is_prompt = row["per"] == "prefill"
        work = Work(row["prompt_tokens"]) if is_prompt else Work(row["sequences"], row["prompt_tokens"])
        seconds = getattr(forecast(shape, here, costs, work), fields[0]) / (1 if is_prompt else work.rows)
        found.append({"case": row["case"], "label": row["label"], "forecast_s": seconds, "measured_s": row["median_s"]})
    return found


def _of_machine(machine: Machine, costs: Costs) -> list[dict[str, Any]]:
    shapes = [ModelShape.of(name, Network.of(ModelSpec.from_config(shape_config(name)))) for name in _SHAPES]
    return [
        {
            "model": shape.name,
            "rows": work.rows,
            "context": work.context,
            # JSON has no infinity.
            "seconds": {name: value if math.isfinite(value) else None for name, value in found._asdict().items()},
        }
        for shape in shapes
        for work in _WORKS
        for found in [forecast(shape, machine, costs, work)]
    ]
