"""One run of a benchmark: contenders brought up, measured in turns, reported, and gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqp_shm.bench.cases import CASES, Case, Job
from tsqp_shm.bench.contenders import (
    OURS,
    SCRIPTS,
    RunningContender,
    parse_contenders,
    require_installed,
)
from tsqp_shm.bench.plot import draw, require_plot
from tsqp_shm.bench.report import Answers, environment, make_rows, print_table
from tsqp_shm.bench.shapes import shape_config, write_shape
from tsqp_shm.config import DTYPES, EngineConfig, require_choice, require_range
from tsqp_shm.errors import ConfigError, ContenderFailed
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.session import sweep_dead_sessions

STDOUT = "-"


@dataclass(frozen=True)
class BenchOptions:
    """What `tsqp-shm bench` was asked for; None: the default.

    Attributes:
        tokens: of each prompt.
        vs: the other contenders, with commas between, or "none".
        runs: counted repetitions; one more before them is not.
        threads: of each process that computes; None: one per core.
        json_file: a path, or "-" for stdout and no table there.
        timeout_s: longest wait for one answer of a contender.
    """

    case: str
    model: str | None = None
    tokens: int | None = None
    vs: str = "transformers-sdpa"
    runs: int = 5
    threads: int | None = None
    json_file: str | None = None
    plot_file: str | None = None
    shape: str | None = None
    layers: int | None = None
    dtype: str = EngineConfig.dtype
    device: str = EngineConfig.device
    timeout_s: float = 600.0
    quiet: bool = False


def run_bench(options: BenchOptions, demo_model: Callable[[], Path]) -> int:
    """Runs one case. Returns the exit code.

    Args:
        demo_model: gives the folder to take where neither a model nor a shape is named.

    Raises:
        ConfigError: an option is not allowed; before any work.
        ContenderFailed: a contender cannot run, has died, or takes too long.
    """
    if options.case == "latency":
        return _run_latency(options)
    case = CASES[options.case]
    tokens = case.default_tokens if options.tokens is None else options.tokens
    contenders = _require_sane(options, case, tokens)
    with ExitStack() as stack:
        # Whatever a killed contender could not remove itself; runs last.
        stack.callback(sweep_dead_sessions)
        folder, name = _model(options, stack, demo_model)
        jobs = _jobs(options, case, tokens, folder, contenders)
        facts = environment()
        with _Progress(options.quiet) as progress:
            running = _start(jobs, stack, options, progress)
            answers = _measure(running, case, options, progress)
    settings = {
        "case": case.name,
        "model": name,
        "tokens": tokens,
        "new_tokens": case.new_tokens,
        "runs": options.runs,
        "threads": jobs[0].threads,
        "dtype": options.dtype,
        "devices": {contender.name: contender.device for contender in running},
    }
    document = {"environment": facts, "settings": settings, "rows": make_rows(case, tokens, answers)}
    _report(document, options)
    return 0


def _run_latency(options: BenchOptions) -> int:
    """The microbenchmark of the hand-over is a script of the repository: it needs no model."""
    script = SCRIPTS / "bench_latency.py"
    if not script.is_file():
        raise ContenderFailed("latency", f"{script} is not there: run from a checkout of the repository")
    command = [sys.executable, str(script)]
    if options.json_file:
        command += ["--json", options.json_file]
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        finally:
            process.terminate()


def _require_sane(options: BenchOptions, case: Case, tokens: int) -> list[str]:
    """Returns the contenders. Everything that can be known to be wrong is said before a model is loaded."""
    require_range("tokens", tokens, 1, 1 << 20)
    require_range("runs", options.runs, 1, 1_000_000)
    if options.threads is not None:
        require_range("threads", options.threads, 1, 1024)
    require_choice("dtype", options.dtype, DTYPES)
    if not 0 < options.timeout_s <= 86400:
        raise ConfigError("timeout", options.timeout_s, "seconds, more than 0 and at most 86400")
    if options.shape is not None:
        if options.model is not None:
            raise ConfigError("shape", options.shape, "either MODEL or --shape")
        shape_config(options.shape, options.layers)
    elif options.layers is not None:
        raise ConfigError("layers", options.layers, "a --shape to take layers of")
    for flag, file in (("json", options.json_file), ("plot", options.plot_file)):
        if file is not None and file != STDOUT and not Path(file).absolute().parent.is_dir():
            raise ConfigError(flag, file, "a file in a folder that exists")
    if options.plot_file is not None:
        require_plot(Path(options.plot_file))
    contenders = [OURS, *parse_contenders(options.vs, case.new_tokens)]
    for name in contenders:
        require_installed(name)
    return contenders


def _model(options: BenchOptions, stack: ExitStack, demo_model: Callable[[], Path]) -> tuple[Path, str]:
    """The folder, and what to call it."""
    if options.shape is None:
        folder = demo_model() if options.model is None else Path(options.model)
        return folder, folder.name or str(folder)
    config = shape_config(options.shape, options.layers)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tsqp-shm-shape-")))
    write_shape(folder, config)
    return folder, f"random {options.shape}, {config['num_hidden_layers']} layers"


def _jobs(options: BenchOptions, case: Case, tokens: int, folder: Path, contenders: list[str]) -> list[Job]:
    jobs = [
        Job(
            contender=name,
            # A contender may have another working folder.
            model=str(folder.absolute()),
            tokens=tokens,
            new_tokens=case.new_tokens,
            sequences=case.sequences,
            threads=options.threads or len(os.sched_getaffinity(0)),
            dtype=options.dtype,
            device=options.device,
            timeout_s=options.timeout_s,
        )
        for name in contenders
    ]
    positions = ModelSpec.from_folder(folder).max_position_embeddings
    needed = jobs[0].total_tokens
    if needed > positions:
        most = tokens - (needed - positions)
        raise ConfigError("tokens", tokens, f"about {max(most, 1)} at most, as the model knows {positions} positions")
    return jobs


def _start(jobs: list[Job], stack: ExitStack, options: BenchOptions, progress: _Progress) -> list[RunningContender]:
    running = []
    for job in jobs:
        progress.show(f"loading {job.contender}")
        contender = RunningContender.start(job)
        stack.callback(contender.stop)
        # One after another: loading together they would only take each other's cores and memory.
        contender.wait_ready(options.timeout_s)
        running.append(contender)
    return running


def _measure(running: list[RunningContender], case: Case, options: BenchOptions, progress: _Progress) -> Answers:
    """A B A B; the first repetition of each is a warm-up."""
    answers: Answers = {(contender.name, count): [] for count in case.sequences for contender in running}
    for number in range(options.runs + 1):
        turn = f"run {number}/{options.runs}" if number else "warm-up"
        for count in case.sequences:
            for contender in running:
                progress.show(f"{turn} {contender.name}")
                answer = contender.repeat(count, options.timeout_s)
                if number:
                    answers[contender.name, count].append(answer)
    return answers


def _report(document: dict[str, Any], options: BenchOptions) -> None:
    text = json.dumps(document, indent=2)
    if options.json_file == STDOUT:
        print(text)
    else:
        print_table(document, sys.stdout)
        if options.json_file:
            Path(options.json_file).write_text(text + "\n")
    if options.plot_file:
        draw(document, Path(options.plot_file))


class _Progress:
    """One line on a terminal, gone at the end; nothing in a pipe."""

    def __init__(self, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.show("")

    def show(self, text: str) -> None:
        if self._shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
