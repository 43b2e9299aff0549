"""`tsqp-shm bench kernels`: the TEE's kernels on slots, beside a copy of the same bytes and beside torch, in turns."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from tsqp_shm import _native
from tsqp_shm.arguments import require_writable
from tsqp_shm.bench.kernel_cases import KernelCase, Run, kernel_cases, kernel_plan
from tsqp_shm.bench.report import environment, machine_line, put_out
from tsqp_shm.bench.shapes import shape_config
from tsqp_shm.bench.tables import print_columns, say
from tsqp_shm.config import require_range
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.progress import Progress
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.slots import open_slots

# A turn repeats its call for this long, and then waits until the threads of the other library sleep again.
TURN_S = 0.01
SETTLE_S = 0.02


@dataclass(frozen=True)
class KernelsOptions:
    """What was asked for.

    Attributes:
        shapes: names of `shapes.SHAPES`.
        tokens: of the prefill whose shapes are taken.
        threads: of our pool and of torch's; None: one per core.
    """

    shapes: tuple[str, ...] = ("smollm2-135m", "llama-3.2-1b")
    tokens: int = 1024
    runs: int = 10
    threads: int | None = None
    json_file: str | None = None


def run_kernels(options: KernelsOptions) -> int:
    """Returns the exit code.

    Raises:
        ConfigError: an option is not allowed; before any work.
        ArenaTooSmall: /dev/shm has no room for the slots.
    """
    require_range("tokens", options.tokens, 1, 1 << 16)
    require_range("runs", options.runs, 1, 1_000_000)
    threads = len(os.sched_getaffinity(0)) if options.threads is None else options.threads
    require_range("threads", threads, 1, 256)
    require_writable("json", options.json_file)
    specs = {name: ModelSpec.from_config(shape_config(name)) for name in options.shapes}
    _native.set_num_threads(threads)
    torch.set_num_threads(threads)
    facts = {**environment(), "threads": threads}
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        for name, spec in specs.items():
            rows += _measure_shape(name, spec, options, progress)
    put_out({"environment": facts, "rows": rows}, options.json_file, None, print_table)
    return 0


def _measure_shape(model: str, spec: ModelSpec, options: KernelsOptions, progress: Progress) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        session = stack.enter_context(Session.begin(f"bench-{os.getpid()}-kernels"))
        plan = kernel_plan(spec, options.tokens)
        arena = stack.enter_context(Arena.create(session.create_memory(plan.total_bytes), plan, 1))
        slots = stack.enter_context(open_slots(arena))
        cases = kernel_cases(spec, options.tokens, arena, slots)
        # They hold views of the arena, which have to go first.
        stack.callback(cases.clear)
        while cases:
            case = cases.pop(0)
            progress.show(f"{model} {case.name}")
            rows += _rows(model, case, _measure(case, options.runs))
            del case
    return rows


def _measure(case: KernelCase, runs: int) -> dict[str, float]:
    """Seconds a call: the median of the turns' medians, by contender: "copy", "torch", instruction sets."""
    contenders: dict[str, Run] = {"copy": case.copy, "torch": case.theirs}
    before = _native.active_instruction_set()
    sets = _native.instruction_sets()
    turns: dict[str, list[float]] = {name: [] for name in (*contenders, *sets)}
    try:
        for number in range(runs + 1):
            for name, medians in turns.items():
                if name in sets:
                    _native.use_instruction_set(name)
                seconds = _one_turn(contenders.get(name, case.ours))
                if number:
                    medians.append(seconds)
    finally:
        _native.use_instruction_set(before)
    return {name: statistics.median(medians) for name, medians in turns.items()}


def _one_turn(run: Run) -> float:
    """The median of the calls of a turn but the first, which wakes threads and fills caches."""
    time.sleep(SETTLE_S)
    run()
    calls: list[float] = []
    end = time.perf_counter() + TURN_S
    while len(calls) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        calls.append(time.perf_counter() - begin)
    return statistics.median(calls)


def _rows(model: str, case: KernelCase, seconds: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "kernel": case.name,
            "model": model,
            "shape": case.shape,
            "contender": name,
            "us": 1e6 * taken,
            "gb_per_s": case.moved_bytes / taken / 1e9,
            "share_of_copy": seconds["copy"] / taken,
            "over_torch": taken / seconds["torch"],
        }
        for name, taken in seconds.items()
    ]


def print_table(document: dict[str, Any], out: TextIO) -> None:
    facts = document["environment"]
    say(machine_line(facts, f"{facts['threads']} threads", "bfloat16"), out)
    cells = [
        [
            *(row[name] for name in ("kernel", "model", "shape", "contender")),
            f"{row['us']:,.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['over_torch']:.2f}",
        ]
        for row in document["rows"]
    ]
    titles = ["kernel", "model", "shape", "contender", "us", "GB/s", "/copy", "/torch"]
    print_columns(titles, cells, out, names=4)
