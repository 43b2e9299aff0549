"""One run: servers brought up, asked in turns, reported, and gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from tsqp_shm.arguments import require_writable
from tsqp_shm.bench.cases import contenders_of
from tsqp_shm.bench.contenders import require_installed
from tsqp_shm.bench.plot import require_plot
from tsqp_shm.bench.report import environment, put_out
from tsqp_shm.bench.serve.peers import Server, Setup, our_servers, parse_peers
from tsqp_shm.bench.serve.picture import draw
from tsqp_shm.bench.serve.prompts import MIN_TOKENS, make_requests, tokenizer_of
from tsqp_shm.bench.serve.rows import Case, Round, make_rows
from tsqp_shm.bench.serve.running import RunningServer
from tsqp_shm.bench.serve.table import print_tables
from tsqp_shm.config import DTYPES, EngineConfig, require_choice, require_range
from tsqp_shm.errors import ConfigError
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.progress import Progress
from tsqp_shm.shm.posix.folder import swept_afterwards


@dataclass(frozen=True)
class ServeOptions:
    """What was asked for; None: the default.

    Attributes:
        modes: of this package's server, each beside the others.
        peers: other engines' servers: kind and the Python of the venv that has it.
        gguf: the same weights, for llama.cpp.
        clients: numbers of them to measure.
        temperatures: to measure each at.
        tokens, new_tokens: of each request.
        requests: of each client, one after another.
        runs: counted rounds; one more before them is not.
        threads: of each process that computes; None: one per core.
        timeout_s: longest wait for a server to be ready, and for a turn.
    """

    model: str | None = None
    modes: tuple[str, ...] = (EngineConfig.mode,)
    peers: tuple[tuple[str, str], ...] = ()
    gguf: str | None = None
    clients: tuple[int, ...] = (1, 8, 32)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    tokens: int = 128
    new_tokens: int = 64
    requests: int = 2
    runs: int = 3
    threads: int | None = None
    dtype: str = EngineConfig.dtype
    device: str = EngineConfig.device
    json_file: str | None = None
    plot_file: str | None = None
    timeout_s: float = 900.0
    quiet: bool = False


def run_serve(options: ServeOptions, demo_model: Callable[[], Path]) -> int:
    """Returns the exit code.

    Raises:
        ConfigError: an option is not allowed; before any work.
        ContenderFailed: a server cannot be started, or has ended.
    """
    servers = _require_sane(options)
    with ExitStack() as stack:
        # Whatever a killed server could not remove itself; runs last.
        stack.enter_context(swept_afterwards())
        folder = (demo_model() if options.model is None else Path(options.model)).absolute()
        setup = _setup(options, folder)
        tokenizer = stack.enter_context(closing(tokenizer_of(folder)))
        facts = environment()
        with Progress(options.quiet) as progress:
            running = []
            # One after another: loading together they would only take each other's cores and memory.
            for server in servers:
                progress.show(f"loading {server.name}")
                running.append(RunningServer.start(server, setup))
                stack.callback(running[-1].stop)
                running[-1].wait_ready(options.timeout_s)
            rounds = _rounds(options, running, tokenizer, progress)
    settings = {
        "model": folder.name,
        "gguf": options.gguf,
        "tokens": options.tokens,
        "new_tokens": options.new_tokens,
        "requests": options.requests,
        "runs": options.runs,
        "threads": setup.threads,
        "sequences": setup.sequences,
        "max_model_len": setup.positions,
        "dtype": options.dtype,
    }
    modes = {server.name: server.mode for server in servers}
    document = {"environment": facts, "settings": settings, "rows": make_rows(rounds, modes)}
    put_out(document, options.json_file, options.plot_file, print_tables, draw)
    return 0


def _rounds(
    options: ServeOptions, running: list[RunningServer], tokenizer: Tokenizer, progress: Progress
) -> dict[Case, dict[str, list[Round]]]:
    """A B A B, each case after the other; the first round of each is a warm-up."""
    cases = [Case(clients, temperature) for temperature in options.temperatures for clients in options.clients]
    rounds: dict[Case, dict[str, list[Round]]] = {case: {each.name: [] for each in running} for case in cases}
    for number in range(options.runs + 1):
        first = 0
        for case in cases:
            numbers = range(first, first + case.clients * options.requests)
            first = numbers.stop
            requests = make_requests(tokenizer, number, numbers, options.tokens, options.new_tokens, case.temperature)
            for server in running:
                progress.show(f"{f'round {number}/{options.runs}' if number else 'warm-up'} {case} {server.name}")
                # Of a warm-up each client's first request is enough.
                asked = requests if number else requests[: case.clients]
                loaded, cpu_s = server.turn(asked, case.clients, options.timeout_s)
                if number:
                    rounds[case][server.name].append(Round(loaded, cpu_s, server.peak_bytes))
    return rounds


def _require_sane(options: ServeOptions) -> list[Server]:
    """Returns the servers. Everything that can be known to be wrong is said before a model is loaded."""
    require_range("tokens", options.tokens, MIN_TOKENS, 1 << 20)
    require_range("new-tokens", options.new_tokens, 2, 1 << 20)
    require_range("requests", options.requests, 1, 1 << 20)
    require_range("runs", options.runs, 1, 1_000_000)
    for clients in options.clients:
        require_range("clients", clients, 1, 1024)
    for temperature in options.temperatures:
        if not 0 <= temperature <= 2:
            raise ConfigError("temperatures", temperature, "0 to 2")
    if options.threads is not None:
        require_range("threads", options.threads, 1, 1024)
    require_choice("dtype", options.dtype, DTYPES)
    if not 0 < options.timeout_s <= 86400:
        raise ConfigError("timeout", options.timeout_s, "seconds, more than 0 and at most 86400")
    require_writable("json", options.json_file)
    require_writable("plot", options.plot_file)
    if options.plot_file is not None:
        require_plot(Path(options.plot_file))
    if len(dict(options.peers)) != len(options.peers):
        raise ConfigError("peer", [name for name, _ in options.peers], "each once")
    servers = [*our_servers(contenders := contenders_of(options.modes)), *parse_peers(dict(options.peers))]
    for name in contenders:
        require_installed(name)
    wants_gguf = any(name.startswith("llamacpp") for name, _ in options.peers)
    if wants_gguf and (options.gguf is None or not Path(options.gguf).is_file()):
        raise ConfigError("gguf", options.gguf, "a GGUF file of the same weights, as llama.cpp reads nothing else")
    return servers


def _setup(options: ServeOptions, folder: Path) -> Setup:
    setup = Setup(
        folder=folder,
        threads=options.threads or len(os.sched_getaffinity(0)),
        sequences=max(options.clients),
        tokens=options.tokens,
        new_tokens=options.new_tokens,
        dtype=options.dtype,
        device=options.device,
        gguf=None if options.gguf is None else Path(options.gguf).absolute(),
    )
    known = ModelSpec.from_folder(folder).max_positions
    if setup.positions > known:
        raise ConfigError("tokens", options.tokens, f"fewer, as the model knows {known} positions")
    return setup
