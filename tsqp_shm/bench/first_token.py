"""`tsqp-shm bench launch`: from the start of a process to the first text of its completion."""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqp_shm.bench.contenders import KINDS, LAST_WORDS_LINES, OURS, POLITE_STOP_S, parse_contenders, require_installed
from tsqp_shm.bench.report import STDOUT, environment, require_writable
from tsqp_shm.config import DTYPES, EngineConfig, require_choice, require_range
from tsqp_shm.errors import ConfigError, ContenderFailed
from tsqp_shm.progress import Progress

PROMPT = "The capital of France is"
NEW_TOKENS = 4


@dataclass(frozen=True)
class LaunchOptions:
    """What was asked for: as `BenchOptions`."""

    model: str | None = None
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
    names = [OURS, *parse_contenders(options.vs, NEW_TOKENS)]
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
                seconds = _time_to_text(name, _command(name, folder, options), options.timeout_s)
                if number:
                    samples[name].append(seconds)
    rows = [_row(name, taken, samples[OURS]) for name, taken in samples.items()]
    document = {"environment": facts, "model": folder.name, "dtype": options.dtype, "rows": rows}
    if options.json_file == STDOUT:
        print(json.dumps(document, indent=2))
        return 0
    _print_table(document)
    if options.json_file:
        Path(options.json_file).write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _command(name: str, folder: Path, options: LaunchOptions) -> list[str]:
    if name == OURS:
        words = ["-m", "tsqp_shm", "launch", str(folder), "--quiet", "--prompt", PROMPT]
        words += ["--max-new-tokens", str(NEW_TOKENS), "--dtype", options.dtype, "--device", options.device]
    else:
        attention = name.removeprefix("transformers-")
        words = ["-m", "tsqp_shm.bench.transformers_once", str(folder), PROMPT, str(NEW_TOKENS)]
        words += [options.dtype, options.device, attention]
    return [sys.executable, *words]


def _time_to_text(name: str, command: list[str], timeout_s: float) -> float:
    """Runs a contender to its end. Returns the seconds from its start to its first text."""
    # A file and not a pipe: nobody has to read it while the process runs.
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process: Any = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONSAFEPATH": "1", **dict(KINDS[name].environment)},
            # Ctrl-C is for the process that measures; it then stops this one.
            start_new_session=True,
        )
        try:
            select.select([process.stdout], [], [], timeout_s)
            seconds = time.perf_counter() - started
            text, _ = process.communicate(timeout=max(0.0, timeout_s - seconds))
        except subprocess.TimeoutExpired:
            raise ContenderFailed(name, f"not at its end within {timeout_s:g} s") from None
        finally:
            _end(process)
        if not text.strip() or process.returncode:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-LAST_WORDS_LINES:]
            raise ContenderFailed(name, "\n".join([f"exit code {process.returncode}, no text; its last words:", *last]))
    return seconds


def _end(process: subprocess.Popen[bytes]) -> None:
    for act in (process.terminate, process.kill):
        if process.poll() is None:
            act()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLITE_STOP_S)
    if process.stdout is not None:
        process.stdout.close()


def _row(name: str, samples: list[float], ours: list[float]) -> dict[str, Any]:
    median = statistics.median(samples)
    return {
        "contender": name,
        "runs": len(samples),
        "median_s": median,
        "min_s": min(samples),
        "max_s": max(samples),
        "samples_s": samples,
        "ours_over_it": statistics.median(ours) / median,
    }


def _print_table(document: dict[str, Any]) -> None:
    facts = document["environment"]
    print(
        f"{facts['cores']} cores of {facts['processor']}; load {facts['load_1m']}; Python {facts['python']}, "
        f"torch {facts['torch']}, transformers {facts['transformers']}"
    )
    print(f"from process start to the first text; {document['model']}, {document['dtype']}; seconds")
    print(f"{'contender':<22}{'median':>8}{'least':>8}{'most':>8}{'tsqp-shm / it':>15}{'n':>4}")
    for row in document["rows"]:
        numbers = "".join(f"{row[name]:>8.2f}" for name in ("median_s", "min_s", "max_s"))
        print(f"{row['contender']:<22}{numbers}{row['ours_over_it']:>15.2f}{row['runs']:>4}")
