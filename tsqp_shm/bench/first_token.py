"""`tsqp-shm bench launch`: from the start of a process to the first text of its completion."""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqp_shm.bench.cases import MODE_OF, contenders_of
from tsqp_shm.bench.contenders import KINDS, POLITE_STOP_S, parse_contenders, require_installed
from tsqp_shm.bench.report import STDOUT, environment, require_writable
from tsqp_shm.config import DTYPES, EngineConfig, require_choice, require_range
from tsqp_shm.errors import ConfigError, ContenderFailed
from tsqp_shm.modes import MODES
from tsqp_shm.progress import Progress
from tsqp_shm.roles.inheritance import kept_apart, kill_session
from tsqp_shm.roles.relay import Relay

# A contender's text is a few tokens.
MAX_TEXT_BYTES = 1 << 16
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
                seconds = _time_to_text(name, _command(name, folder, options), options.timeout_s)
                if number:
                    samples[name].append(seconds)
    rows = [_row(name, taken, samples[names[0]]) for name, taken in samples.items()]
    document = {"environment": facts, "model": folder.name, "dtype": options.dtype, "rows": rows}
    if options.json_file == STDOUT:
        print(json.dumps(document, indent=2))
        return 0
    _print_table(document)
    if options.json_file:
        Path(options.json_file).write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _command(name: str, folder: Path, options: LaunchOptions) -> list[str]:
    if name in MODE_OF:
        words = ["-m", "tsqp_shm", "launch", str(folder), "--mode", MODE_OF[name], "--quiet", "--prompt", PROMPT]
        words += ["--max-new-tokens", str(NEW_TOKENS)]
        if MODES[MODE_OF[name]].has_gpu_process:
            words += ["--dtype", options.dtype, "--device", options.device]
    else:
        attention = name.removeprefix("transformers-")
        words = ["-m", "tsqp_shm.bench.transformers_once", str(folder), PROMPT, str(NEW_TOKENS)]
        words += [options.dtype, options.device, attention]
    return [sys.executable, *words]


def _time_to_text(name: str, command: list[str], timeout_s: float) -> float:
    """Runs a contender to its end. Returns the seconds from its start to its first text."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kept_apart(dict(KINDS[name].environment)),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    relay = Relay(name, process.stderr, lambda line: None)
    try:
        text, seconds = _read(name, process.stdout.fileno(), started, timeout_s)
        process.wait(max(0.0, started + timeout_s - time.perf_counter()))
    except subprocess.TimeoutExpired:
        raise _late(name, timeout_s) from None
    finally:
        _end(process)
        relay.finish()
    if not text.strip() or process.returncode:
        said = f"exit code {process.returncode}, no text; its last words:\n{relay.last_words}"
        raise ContenderFailed(name, said.rstrip())
    return seconds


def _read(name: str, descriptor: int, started: float, timeout_s: float) -> tuple[bytes, float]:
    """All of a contender's text, and the seconds until its first piece."""
    text, seconds = b"", 0.0
    # UNTRUSTED: all of it has this time and so many bytes, in whatever pieces it comes.
    while len(text) <= MAX_TEXT_BYTES:
        left_s = started + timeout_s - time.perf_counter()
        if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
            raise _late(name, timeout_s)
        if not text:
            seconds = time.perf_counter() - started
        piece = os.read(descriptor, MAX_TEXT_BYTES)
        if not piece:
            return text, seconds
        text += piece
    raise ContenderFailed(name, f"a text of more than {MAX_TEXT_BYTES:,} bytes")


def _late(name: str, timeout_s: float) -> ContenderFailed:
    return ContenderFailed(name, f"not at its end within {timeout_s:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    for act in (process.terminate, process.kill):
        if process.poll() is None:
            act()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLITE_STOP_S)
    kill_session(process.pid)
    if process.stdout is not None:
        process.stdout.close()


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


def _print_table(document: dict[str, Any]) -> None:
    facts = document["environment"]
    print(
        f"{facts['cores']} cores of {facts['processor']}; load {facts['load_1m']}; Python {facts['python']}, "
        f"torch {facts['torch']}, transformers {facts['transformers']}"
    )
    print(f"from process start to the first text; {document['model']}, {document['dtype']}; seconds")
    first = document["rows"][0]["contender"]
    print(f"{'contender':<22}{'median':>8}{'least':>8}{'most':>8}{f'{first} / it':>25}{'n':>4}")
    for row in document["rows"]:
        numbers = "".join(f"{row[name]:>8.2f}" for name in ("median_s", "min_s", "max_s"))
        print(f"{row['contender']:<22}{numbers}{row['ours_over_it']:>25.2f}{row['runs']:>4}")
