"""One run of a benchmark: contenders brought up, measured in turns, reported, and gone."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tsqp_shm.arguments import require_writable
from tsqp_shm.bench.arithmetic import prefill_flops
from tsqp_shm.bench.cases import CASES, MODE_OF, Case, Job, contenders_of
from tsqp_shm.bench.chosen_model import ChosenModel
from tsqp_shm.bench.contenders import parse_contenders, require_installed
from tsqp_shm.bench.plot import draw, require_plot
from tsqp_shm.bench.repetitions import repeat_in_turns, require_positions, start_contenders
from tsqp_shm.bench.report import environment, make_rows, print_table, put_out
from tsqp_shm.config import DTYPES, EngineConfig, require_choice, require_range
from tsqp_shm.errors import ConfigError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.progress import Progress
from tsqp_shm.shm.posix.folder import swept_afterwards


@dataclass(frozen=True)
class BenchOptions:
    """What `tsqp-shm bench` was asked for; None: the default.

    Attributes:
        tokens: of each prompt; more than one length for prefill alone.
        mode: of this system.
        vs: the other contenders, with commas between, or "none".
        runs: counted repetitions; one more before them is not.
        threads: of each process that computes; None: one per core.
        sweep: fields of `EngineConfig` with the values to measure, each combination as a contender of its own.
        json_file: a path, or "-" for stdout and no table there.
        timeout_s: longest wait for one answer of a contender.
    """

    case: str
    model: str | None = None
    tokens: tuple[int, ...] = ()
    mode: str = EngineConfig.mode
    vs: str = "transformers-sdpa"
    runs: int = 5
    threads: int | None = None
    json_file: str | None = None
    plot_file: str | None = None
    shape: str | None = None
    layers: int | None = None
    sweep: tuple[tuple[str, tuple[int, ...]], ...] = ()
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
    case = CASES[options.case]
    tokens = options.tokens or (case.default_tokens,)
    contenders = _require_sane(options, case, tokens)
    with ExitStack() as stack:
        # Whatever a killed contender could not remove itself; runs last.
        stack.enter_context(swept_afterwards())
        folder, name = _model(options).open(stack, demo_model)
        jobs = _jobs(options, case, tokens, folder, contenders)
        network = Network.of(ModelSpec.from_folder(folder))
        flops = None if case.new_tokens else {length: prefill_flops(network, length) for length in tokens}
        facts = environment()
        with Progress(options.quiet) as progress:
            running = start_contenders(jobs, stack, options.timeout_s, progress)
            answers = repeat_in_turns(running, options.runs, options.timeout_s, progress)
    settings = {
        "case": case.name,
        "model": name,
        "tokens": list(tokens),
        "new_tokens": case.new_tokens,
        "runs": options.runs,
        "threads": jobs[0].threads,
        "dtype": options.dtype,
        "devices": {contender.name: contender.device for contender in running},
    }
    document = {"environment": facts, "settings": settings, "rows": make_rows(answers, flops)}
    put_out(document, options.json_file, options.plot_file, print_table, draw)
    return 0


def _require_sane(options: BenchOptions, case: Case, tokens: tuple[int, ...]) -> list[str]:
    """Returns the contenders. Everything that can be known to be wrong is said before a model is loaded."""
    for length in tokens:
        require_range("tokens", length, 1, 1 << 20)
    if case.new_tokens and len(tokens) > 1:
        raise ConfigError("tokens", ",".join(map(str, tokens)), f"one length for {case.name}")
    require_range("runs", options.runs, 1, 1_000_000)
    if options.threads is not None:
        require_range("threads", options.threads, 1, 1024)
    require_choice("dtype", options.dtype, DTYPES)
    ours = contenders_of((options.mode,))
    for settings in _combinations(options):
        for name in ours:
            EngineConfig(mode=MODE_OF[name], **settings)  # type: ignore[arg-type]
    if not 0 < options.timeout_s <= 86400:
        raise ConfigError("timeout", options.timeout_s, "seconds, more than 0 and at most 86400")
    _model(options).require_sane()
    require_writable("json", options.json_file)
    require_writable("plot", options.plot_file)
    if options.plot_file is not None:
        require_plot(Path(options.plot_file))
    contenders = [*ours, *parse_contenders(options.vs, case.new_tokens)]
    for name in contenders:
        require_installed(name)
    return contenders


def _model(options: BenchOptions) -> ChosenModel:
    return ChosenModel(options.model, options.shape, options.layers)


def _combinations(options: BenchOptions) -> list[dict[str, int]]:
    names = [name for name, _ in options.sweep]
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*(v for _, v in options.sweep))]


def _jobs(options: BenchOptions, case: Case, tokens: tuple[int, ...], folder: Path, contenders: list[str]) -> list[Job]:
    jobs = [
        Job(
            contender=name,
            model=str(folder),
            turns=tuple(turn for length in tokens for turn in case.turns(length)),
            threads=options.threads or len(os.sched_getaffinity(0)),
            dtype=options.dtype,
            device=options.device,
            timeout_s=options.timeout_s,
            settings=settings,
        )
        for name in contenders
        for settings in (_combinations(options) if name in MODE_OF else [{}])
    ]
    require_positions(jobs, folder)
    return jobs
