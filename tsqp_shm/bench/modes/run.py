"""One run of `tsqp-shm bench modes`: every mode a contender, in turns, each asleep but in its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsqp_shm.arguments import require_writable
from tsqp_shm.bench.cases import CASES, MODE_OF, Job, Turn, contenders_of
from tsqp_shm.bench.chosen_model import ChosenModel
from tsqp_shm.bench.contenders import RunningContender, require_installed
from tsqp_shm.bench.modes.forecast import ModelShape
from tsqp_shm.bench.modes.machines import assumed
from tsqp_shm.bench.modes.measured import FORECAST_BY, calibrate
from tsqp_shm.bench.modes.outlook import outlook
from tsqp_shm.bench.modes.picture import draw
from tsqp_shm.bench.modes.rows import make_rows
from tsqp_shm.bench.modes.table import print_tables
from tsqp_shm.bench.plot import require_plot
from tsqp_shm.bench.repetitions import repeat_in_turns, require_positions, start_contenders
from tsqp_shm.bench.report import environment, put_out
from tsqp_shm.config import DTYPES, EngineConfig, require_choice, require_range
from tsqp_shm.errors import ConfigError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.modes import MODES
from tsqp_shm.progress import Progress
from tsqp_shm.shm.posix.folder import swept_afterwards

STOCKED, SUSTAINED = "stocked", "sustained"
# The cases, each with its sequences, in the order of --tokens.
_MEASURED = (("prefill", 1), ("decode", 1), ("batch", 8))
# Of sustained: small blocks of rows, as all pads of one are waited for together.
_SUSTAINED_BLOCK_ROWS = 128
# A stock is not filled to the last row: pads are made in batches.
_MORE_ROWS = 256


@dataclass(frozen=True)
class ModesOptions:
    """What was asked for; None: the default.

    Attributes:
        tokens: of the prompt, in front of decode, and in front of decode in batches.
        new_tokens: decoded by each sequence, timed.
        threads: of each process that computes, as `BenchOptions`; pad_threads: that make pads. None: one per core.
        assume: of a machine that the forecast is to be made for too.
    """

    model: str | None = None
    modes: tuple[str, ...] = tuple(MODES)
    tokens: tuple[int, ...] = tuple(CASES[name].default_tokens for name, _ in _MEASURED)
    new_tokens: int = CASES["decode"].new_tokens
    runs: int = 5
    threads: int | None = None
    pad_threads: int | None = None
    dtype: str = EngineConfig.dtype
    device: str = EngineConfig.device
    shape: str | None = None
    layers: int | None = None
    assume: str = ""
    json_file: str | None = None
    plot_file: str | None = None
    timeout_s: float = 600.0
    quiet: bool = False


def run_modes(options: ModesOptions, demo_model: Callable[[], Path]) -> int:
    """Returns the exit code.

    Raises:
        ConfigError: an option is not allowed; before any work.
        ContenderFailed: a contender cannot run, has died, or takes too long.
    """
    _require_sane(options)
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        # Whatever a killed contender could not remove itself; runs last.
        stack.enter_context(swept_afterwards())
        folder, name = _model(options).open(stack, demo_model)
        network = Network.of(ModelSpec.from_folder(folder))
        jobs = _jobs(options, folder, cores)
        require_positions(jobs, folder)
        facts = environment()
        with Progress(options.quiet) as progress:
            calibration = None
            if set(FORECAST_BY) <= set(options.modes):
                progress.show("measuring what the forecast takes from this machine")
                calibration = calibrate(cores)
            running = start_contenders(jobs, stack, options.timeout_s, progress)
            answers = repeat_in_turns(running, options.runs, options.timeout_s, progress)
    rows = make_rows(answers, running, len(network.linears))
    document: dict[str, Any] = {
        "environment": facts,
        "settings": _settings(options, name, jobs, running, cores),
        "rows": rows,
        "outlook": calibration
        and outlook(
            calibration,
            rows,
            ModelShape.of(name, network),
            cores,
            jobs[0].threads,
            of_reader=assumed(options.assume) if options.assume else None,
        ),
    }
    put_out(document, options.json_file, options.plot_file, print_tables, draw)
    return 0


def _require_sane(options: ModesOptions) -> None:
    if len(options.tokens) != len(_MEASURED):
        names = ", ".join(name for name, _ in _MEASURED)
        raise ConfigError("tokens", ",".join(map(str, options.tokens)), f"three lengths, for {names}")
    for length in options.tokens:
        require_range("tokens", length, 1, 1 << 20)
    require_range("new_tokens", options.new_tokens, 1, 1 << 16)
    require_range("runs", options.runs, 1, 1_000_000)
    for name in ("threads", "pad_threads"):
        if getattr(options, name) is not None:
            require_range(name, getattr(options, name), 1, 1024)
    require_choice("dtype", options.dtype, DTYPES)
    if not 0 < options.timeout_s <= 86400:
        raise ConfigError("timeout", options.timeout_s, "seconds, more than 0 and at most 86400")
    assumed(options.assume)
    _model(options).require_sane()
    require_writable("json", options.json_file)
    require_writable("plot", options.plot_file)
    if options.plot_file is not None:
        require_plot(Path(options.plot_file))
    for contender in contenders_of(options.modes):
        require_installed(contender)


def _model(options: ModesOptions) -> ChosenModel:
    return ChosenModel(options.model, options.shape, options.layers)


def _jobs(options: ModesOptions, folder: Path, cores: int) -> list[Job]:
    turns = tuple(
        Turn(case, sequences, tokens, options.new_tokens if CASES[case].new_tokens else 0)
        for (case, sequences), tokens in zip(_MEASURED, options.tokens, strict=True)
    )
    jobs = []
    for contender in contenders_of(options.modes):
        job = Job(
            contender,
            str(folder),
            turns,
            threads=options.threads or cores,
            dtype=options.dtype,
            device=options.device,
            timeout_s=options.timeout_s,
            sleeps=True,
        )
        if MODES[MODE_OF[contender]].has_pads:
            jobs += [_stocked(job, options.pad_threads or cores), _sustained(job, options.pad_threads or cores)]
        else:
            jobs.append(job)
    return jobs


def _stocked(job: Job, pad_threads: int) -> Job:
    """With a pad for every row of a turn before it begins; without one a run fails."""
    rows = max(turn.sequences * turn.positions for turn in job.turns)
    turns = tuple(replace(turn, stocked_rows=rows) for turn in job.turns)
    settings: Mapping[str, int | str] = {
        "pad_stock": str(rows + _MORE_ROWS),
        "pad_threads": pad_threads,
        "pads_out": "refuse",
        "prefill": "gpu",
    }
    return replace(job, turns=turns, settings=settings, label=STOCKED)


def _sustained(job: Job, pad_threads: int) -> Job:
    """Without a stock to begin with: as many rows as it holds go before, and as many are timed, so that it is as full
    at the end as at the beginning."""
    block_rows = min(_SUSTAINED_BLOCK_ROWS, max(turn.tokens for turn in job.turns))
    # What a pass has in flight gives its pads back when it is over: more than the stock holds would wait for itself.
    stock_rows = 2 * block_rows
    turns = []
    for turn in job.turns:
        each = -(-stock_rows // turn.sequences)
        turns.append(replace(turn, lead_tokens=each, new_tokens=each if turn.new_tokens else 0))
    settings: Mapping[str, int | str] = {
        "pad_stock": str(stock_rows),
        "pad_threads": pad_threads,
        "pads_out": "wait",
        "prefill": "gpu",
        "block_rows": block_rows,
        "max_batch_tokens": max(stock_rows, job.max_sequences),
    }
    return replace(job, turns=tuple(turns), settings=settings, label=SUSTAINED)


def _settings(
    options: ModesOptions, name: str, jobs: list[Job], running: list[RunningContender], cores: int
) -> dict[str, Any]:
    return {
        "model": name,
        "tokens": list(options.tokens),
        "new_tokens": options.new_tokens,
        "runs": options.runs,
        "threads": jobs[0].threads,
        "pad_threads": options.pad_threads or cores,
        "pad_stock": {job.label: int(job.settings["pad_stock"]) for job in jobs if job.label},
        "dtype": options.dtype,
        "devices": {contender.name: contender.device for contender in running},
    }
