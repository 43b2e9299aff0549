"""`tsqp-shm bench launch`: from the start of a process to the first text of its completion."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tsqp_shm.arguments import require_writable
from tsqp_shm.bench.cases import MODE_OF, contenders_of
from tsqp_shm.bench.contenders import KINDS, parse_contenders, require_installed
from tsqp_shm.bench.report import environment, machine_line, put_out
from tsqp_shm.bench.tables import print_columns, say
from tsqp_shm.bench.whole_run import run_whole
from tsqp_shm.config import DTYPES, EngineConfig, require_choice, require_range
from tsqp_shm.errors import ConfigError
from tsqp_shm.modes import MODES
from tsqp_shm.progress import Progress

PROMPT = "The capital of France is"
NEW_TOKENS = 4


@dataclass(frozen=True)
class LaunchOptions:
    """What was asked for: as `BenchOptions`."""

    model: str | None = None
    modes: tuple[str, ...] = (EngineConfig.mode,)
    vs: str = "transformers-sdpa"
    runs: int = 5
    dtype: str = EngineConfig.dtype
    device: str = EngineConfig.device
    json_file: str | None = None
    timeout_s: float = 120.0
    quiet: bool = False


def run_launch(options: LaunchOptions, demo_model: Callable[[], Path]) -> int:
    """Returns the exit code.

    Raises:
        ConfigError: an option is not allowed; before any work.
        ContenderFailed: a contender cannot run, gives no text, or takes too long.
    """
    require_range("runs", options.runs, 1, 1_000_000)
    require_choice("dtype", options.dtype, DTYPES)
    require_writable("json", options.json_file)
    names = [*contenders_of(options.modes), *parse_contenders(options.vs, NEW_TOKENS)]
    for name in names:
        require_installed(name)
    folder = (demo_model() if options.model is None else Path(options.model)).absolute()
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError("model", folder, "a model with a tokenizer, as text is waited for")
    facts = environment()
    samples: dict[str, list[float]] = {name: [] for name in names}
    with Progress(options.quiet) as progress:
        # The first of each fills the page cache, and is not counted.
        for number in range(options.runs + 1):
            for name in names:
                progress.show(f"run {number}/{options.runs} {name}")
                variables = dict(KINDS[name].environment)
                run = run_whole(name, _command(name, folder, options), variables, options.timeout_s)
                if number:
                    samples[name].append(run.first_s)
    rows = [_row(name, taken, samples[names[0]]) for name, taken in samples.items()]
    document = {"environment": facts, "model": folder.name, "dtype": options.dtype, "rows": rows}
    put_out(document, options.json_file, None, print_table)
    return 0


def _command(name: str, folder: Path, options: LaunchOptions) -> list[str]:
    if name in MODE_OF:
        words = ["-m", "tsqp_shm", "launch", str(folder), "--mode", MODE_OF[name], "--quiet", "--prompt", PROMPT]
        words += ["--max-new-tokens", str(NEW_TOKENS)]
        if MODES[MODE_OF[name]].has_gpu_process:
            words += ["--device", options.device]
        if MODES[MODE_OF[name]].arithmetic is None:
            words += ["--dtype", options.dtype]
    else:
        attention = name.removeprefix("transformers-")
        words = ["-m", "tsqp_shm.bench.transformers_once", str(folder), PROMPT, str(NEW_TOKENS)]
        words += [options.dtype, options.device, attention]
    return [sys.executable, *words]


def _row(name: str, samples: list[float], ours: list[float]) -> dict[str, Any]:
    median = statistics.median(samples)
    return {
        "contender": name,
        "mode": MODE_OF.get(name),
        "runs": len(samples),
        "median_s": median,
        "min_s": min(samples),
        "max_s": max(samples),
        "samples_s": samples,
        "ours_over_it": statistics.median(ours) / median,
    }


def print_table(document: dict[str, Any], out: TextIO) -> None:
    say(machine_line(document["environment"]), out)
    say(f"from process start to the first text; {document['model']}; seconds", out)
    cells = [
        [
            row["contender"],
            (row["mode"] and MODES[row["mode"]].arithmetic) or document["dtype"],
            *(f"{row[name]:.2f}" for name in ("median_s", "min_s", "max_s")),
            f"{row['ours_over_it']:.2f}",
            f"{row['runs']}",
        ]
        for row in document["rows"]
    ]
    first = document["rows"][0]["contender"]
    print_columns(["contender", "arithmetic", "median", "least", "most", f"{first} / it", "n"], cells, out, names=2)
