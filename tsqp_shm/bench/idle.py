"""`tsqp-shm bench idle`: what a session takes of a core while nobody asks it anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tsqp_shm.arguments import require_writable
from tsqp_shm.bench.cases import contenders_of
from tsqp_shm.bench.child import processor_seconds
from tsqp_shm.bench.report import environment, machine_line, put_out
from tsqp_shm.bench.tables import print_columns, say
from tsqp_shm.config import DTYPES, EngineConfig, require_choice
from tsqp_shm.errors import ConfigError
from tsqp_shm.llm import LLM, SamplingParams
from tsqp_shm.modes import MODES
from tsqp_shm.progress import Progress

# Until both sides have parked; and pads are made while nobody asks, as long as there is room for any.
SETTLE_S = 1.0


@dataclass(frozen=True)
class IdleOptions:
    """What was asked for. Units: seconds."""

    model: str | None = None
    modes: tuple[str, ...] = (EngineConfig.mode,)
    seconds: float = 20.0
    dtype: str = EngineConfig.dtype
    device: str = EngineConfig.device
    json_file: str | None = None
    quiet: bool = False


def run_idle(options: IdleOptions, demo_model: Callable[[], Path]) -> int:
    """Returns the exit code.

    Raises:
        ConfigError: an option is not allowed; before any work.
        TsqpError: the session cannot be begun, or ends.
    """
    require_choice("dtype", options.dtype, DTYPES)
    contenders_of(options.modes)
    require_writable("json", options.json_file)
    if not 0 < options.seconds <= 3600:
        raise ConfigError("seconds", options.seconds, "more than 0 and at most 3,600")
    folder = (demo_model() if options.model is None else Path(options.model)).absolute()
    with Progress(options.quiet) as progress:
        shares = {}
        for mode in options.modes:
            progress.show(f"an idle session of mode {mode} for {options.seconds:g} s")
            shares[mode] = _core_shares(folder, mode, options)
    document = {
        "environment": environment(),
        "model": folder.name,
        "dtype": options.dtype,
        "seconds": options.seconds,
        "core_share": shares,
    }
    put_out(document, options.json_file, None, print_table)
    return 0


def print_table(document: dict[str, Any], out: TextIO) -> None:
    say(machine_line(document["environment"]), out)
    say(f"{document['model']}, idle for {document['seconds']:g} s; CPU time, of one core", out)
    cells = [
        [mode, MODES[mode].arithmetic or document["dtype"], process, f"{share:.2%}"]
        for mode, of_mode in document["core_share"].items()
        for process, share in of_mode.items()
    ]
    print_columns(["mode", "arithmetic", "process", "of a core"], cells, out, names=3)


def _core_shares(folder: Path, mode: str, options: IdleOptions) -> dict[str, float]:
    """The CPU time of each process while a session that has worked is idle, divided by the time that passed."""
    settings: dict[str, Any] = {"device": options.device} if MODES[mode].has_gpu_process else {}
    if MODES[mode].arithmetic is None:
        settings["dtype"] = options.dtype
    with LLM(folder, mode=mode, **settings) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True, temperature=0))
        pids = {role: facts["pid"] for role, facts in llm.bring_up()["processes"].items()}
        _settle(llm)
        began = time.monotonic()
        before = {process: processor_seconds(pid) for process, pid in pids.items()}
        time.sleep(options.seconds)
        passed_s = time.monotonic() - began
        return {process: (processor_seconds(pid) - before[process]) / passed_s for process, pid in pids.items()}


def _settle(llm: LLM) -> None:
    """Returns when both sides have parked and no pads are made any more."""
    made, made_before = 0, -1
    while made != made_before:
        time.sleep(SETTLE_S)
        made, made_before = llm.stats().get("pads", {}).get("made", 0), made
