"""`tsqp-shm VERB [MODEL] [flags]`: what a user types. Flags and defaults come from `config` and `SamplingParams`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tsqp_shm._version import __version__
from tsqp_shm.config import DOORBELLS, DTYPES, MODE_WARNING, EngineConfig
from tsqp_shm.errors import ConfigError, ModelFileError, PeerDied, TsqpError
from tsqp_shm.process import ERROR_PREFIX, Lifeline

PARENT_SPEAKS_FIRST_S = 2.0
DEFAULT_PROMPT = "The capital of France is"

EPILOG = f"""{MODE_WARNING}

exit codes: 0 well, 1 failed, 2 usage, 3 the other process died or broke the protocol, 128+n ended by signal n.
Flags of session, GPU process, model, arena and doorbell may be set by environment too: --max-model-len is
TSQP_SHM_MAX_MODEL_LEN; a flag wins over the environment.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    lifeline = Lifeline.from_environment()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup it is ignored, and stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit_by_signal)
    # A parent that is gone, or that asks this process to end, is the same as a polite signal.
    lifeline.on_parent_gone(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        code: int = arguments.run(arguments, lifeline)
    except TsqpError as error:
        lifeline.failed(error)
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of stdout has gone; there is nobody to tell, and Python must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _exit_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Lets Ctrl-C wait while modules load: numpy would take it for a broken installation.

    A launch starts the TEE process with it blocked, for the time before this.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    # In a terminal Ctrl-C comes twice, from the terminal and from the parent; the second must not disturb the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _launch(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with _blocked_interrupts():
        from tsqp_shm.launch import launch

        config = _engine_config(arguments)
        _require_sane(arguments)
    model = _model_folder(arguments)
    return launch(
        model,
        config,
        _given(arguments, _common_flags(), _tee_flags()),
        _given(arguments, _common_flags(), _gpu_flags()),
        arguments.verbose,
    )


def _tee(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with _blocked_interrupts():
        from tsqp_shm.console import run_prompts
        from tsqp_shm.llm import LLM

        signal.signal(signal.SIGINT, _interrupt_once)

    config = _engine_config(arguments)
    _require_sane(arguments)
    params = _sampling_params(arguments)
    # Whom it waits for is of interest to a person at this terminal, not to a supervisor that starts both.
    report = _silent if lifeline.has_parent else _reporter(arguments)
    overrides = {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}
    try:
        with LLM(_model_folder(arguments), start_gpu=False, report=report, **overrides) as llm:
            lifeline.ready()
            run_prompts(
                llm,
                params,
                _prompt(arguments),
                chat=arguments.chat,
                interactive=arguments.interactive,
                json_output=arguments.json,
                quiet=arguments.quiet,
            )
    except PeerDied:
        if lifeline.has_parent:
            # The parent of both sees why the GPU process died, where this process sees only its silence: it ends
            # this process and says so, if that process does end.
            time.sleep(PARENT_SPEAKS_FIRST_S)
        raise
    return 0


def _gpu(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    # The waits of OpenMP's threads after a parallel region would steal the cores that the TEE process needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    config = _engine_config(arguments)
    model = _model_folder(arguments)
    if config.session is None:
        raise ConfigError("session", None, "--session NAME, the name the TEE process uses")
    try:
        from tsqp_shm.gpu.worker import serve
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModelFileError("torch", "the GPU process needs it: pip install '.[gpu]' in a clone of tsqp-shm") from None
    from tsqp_shm.shm.session import sweep_dead_sessions

    # Ctrl-C in a shared terminal is for the TEE process, which then stops this one.
    try:
        serve(
            model,
            config.session,
            config.device,
            config.gpu_threads,
            config.timeout_s,
            _reporter(arguments),
            lifeline.ready,
        )
    finally:
        sweep_dead_sessions()
    return 0


def _bench(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with _blocked_interrupts():
        from tsqp_shm.bench.run import BenchOptions, run_bench

    config = _engine_config(arguments)
    given = {name: getattr(arguments, name) for name in BenchOptions.__dataclass_fields__}
    chosen = {name: value for name, value in given.items() if value is not None}
    options = BenchOptions(**{**chosen, "dtype": config.dtype, "device": config.device})
    return run_bench(options, lambda: _model_folder(arguments))


def _reporter(arguments: argparse.Namespace) -> Callable[[str], None]:
    def report(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    return report


def _silent(line: str) -> None:
    return


def _model_folder(arguments: argparse.Namespace) -> Path:
    if arguments.model is not None:
        return Path(arguments.model)
    from tsqp_shm.model.demo import demo_model_folder

    return demo_model_folder(_reporter(arguments))


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        return DEFAULT_PROMPT if arguments.prompt is None else str(arguments.prompt)
    if arguments.prompt_file == "-":
        return sys.stdin.read()
    try:
        return Path(arguments.prompt_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError("prompt-file", arguments.prompt_file, f"a readable text file ({reason})") from None


def _require_sane(arguments: argparse.Namespace) -> None:
    """Raises:
    ConfigError: flags that cannot go together, or sampling values that are not allowed; before any work.
    """
    _sampling_params(arguments)
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise ConfigError("prompt-file", arguments.prompt_file, "either --prompt or --prompt-file")
    if arguments.interactive and arguments.json:
        raise ConfigError("json", True, "no --json together with --interactive")
    if arguments.interactive and (arguments.prompt is not None or arguments.prompt_file is not None):
        raise ConfigError("interactive", True, "no --prompt and no --prompt-file, as it asks for prompts")


def _sampling_params(arguments: argparse.Namespace) -> Any:
    from tsqp_shm.tee.sampler import SamplingParams

    names = {"max_new_tokens": "max_tokens"}
    chosen = {
        names.get(name, name): getattr(arguments, name)
        for name in _SAMPLING_FLAGS
        if _is_given(getattr(arguments, name))
    }
    return SamplingParams(**chosen)


def _engine_config(arguments: argparse.Namespace) -> EngineConfig:
    renamed = {"timeout": "timeout_s"}
    values = {
        renamed.get(name, name): value
        for name, value in vars(arguments).items()
        if renamed.get(name, name) in EngineConfig.__dataclass_fields__
    }
    return EngineConfig.from_environment(values)


_SAMPLING_FLAGS = (
    "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "ignore_eos",
)  # fmt: skip


def _given(arguments: argparse.Namespace, *parsers: _Parser) -> list[str]:
    """The flags of `parsers` that the user gave, as arguments again. MODEL and --session are the caller's to add."""
    words: list[str] = []
    for action in (action for parser in parsers for action in parser._actions):
        value = getattr(arguments, action.dest, None)
        if not action.option_strings or action.dest == "session" or not _is_given(value):
            continue
        for item in value if isinstance(value, list) else [value]:
            words.append(action.option_strings[-1] if item is True else f"{action.option_strings[-1]}={item}")
    return words


def _is_given(value: object) -> bool:
    # Not `in (None, False)`: 0 equals False, and --seed 0 is a seed.
    return value is not None and value is not False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A wrong flag gets one line; the usage of all the others would bury it."""
        self.exit(ConfigError.exit_code, f"{ERROR_PREFIX}{message}; see {self.prog} --help\n")


def _model_argument() -> _Parser:
    parser = _Parser(add_help=False)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a Hugging Face folder; without it, the demo model is fetched and used",
    )
    return parser


def _common_flags() -> _Parser:
    defaults = EngineConfig()
    parser = _Parser(add_help=False)
    group = parser.add_argument_group("session")
    group.add_argument("--session", metavar="NAME", help="the name under which the two processes meet")
    group.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help=f"longest wait for the other process ({defaults.timeout_s:.0f} s)",
    )
    group.add_argument("-q", "--quiet", action="store_true", help="print the completion and errors only")
    return parser


def _gpu_flags() -> _Parser:
    defaults = EngineConfig()
    parser = _Parser(add_help=False)
    group = parser.add_argument_group("GPU process")
    group.add_argument("--device", metavar="auto|cpu|cuda[:N]", help=f"where it computes ({defaults.device})")
    group.add_argument("--gpu-threads", type=int, metavar="N", help="its threads on the CPU (one per core)")
    return parser


def _tee_flags() -> _Parser:
    from tsqp_shm.config import DEFAULT_MAX_MODEL_LEN

    defaults = EngineConfig()
    parser = _Parser(add_help=False)
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", metavar="TEXT", help=f"what to complete ({DEFAULT_PROMPT!r})")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file, or from - (stdin)")
    prompt.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompt")
    prompt.add_argument("--interactive", action="store_true", help="ask for prompts, turn by turn; Ctrl-D ends")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to generate (64)")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest token (0)")
    sampling.add_argument("--top-p", type=float, metavar="X", help="sample within this probability (1)")
    sampling.add_argument("--top-k", type=int, metavar="N", help="sample among N tokens; 0: all (0)")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 repeats less (1)")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="ends the completion; may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")

    model = parser.add_argument_group("model and arena")
    model.add_argument("--dtype", metavar="|".join(DTYPES), help=f"of slots and arithmetic ({defaults.dtype})")
    model.add_argument(
        "--max-model-len", type=int, metavar="N",
        help=f"longest prompt and completion, in tokens (the model's, at most {DEFAULT_MAX_MODEL_LEN})",
    )  # fmt: skip
    model.add_argument("--max-num-seqs", type=int, metavar="N", help=f"sequences at once ({defaults.max_num_seqs})")
    model.add_argument(
        "--max-batch-tokens", type=int, metavar="N",
        help=f"tokens in one forward pass; longer prompts go in chunks ({defaults.max_batch_tokens})",
    )  # fmt: skip
    model.add_argument("--tile-rows", type=int, metavar="N", help=f"rows of an attention tile ({defaults.tile_rows})")
    model.add_argument("--tiles-in-flight", type=int, metavar="N", help=f"score slots ({defaults.tiles_in_flight})")
    model.add_argument(
        "--block-rows", type=int, metavar="N", help=f"rows that go through the layers together ({defaults.block_rows})"
    )
    model.add_argument("--tee-threads", type=int, metavar="N", help="threads of the TEE's kernels (one per core)")

    bell = parser.add_argument_group("doorbell")
    bell.add_argument(
        "--doorbell", metavar="|".join(DOORBELLS),
        help=f"how a side waits: rings and ZeroMQ for sleepers, ZeroMQ alone, or never asleep ({defaults.doorbell})",
    )  # fmt: skip
    bell.add_argument("--endpoint", metavar="URL", help="ipc://PATH or tcp://127.0.0.1:PORT (a socket of the session)")
    bell.add_argument("--spin-us", type=int, metavar="N", help=f"spin so long before yielding ({defaults.spin_us})")
    bell.add_argument("--yield-us", type=int, metavar="N", help=f"yield so long before sleeping ({defaults.yield_us})")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    return parser


def _bench_flags() -> _Parser:
    defaults = EngineConfig()
    parser = _Parser(add_help=False)
    parser.add_argument(
        "case",
        choices=("prefill", "decode", "batch", "latency"),
        help="what to measure; latency is scripts/bench_latency.py, and takes --json alone",
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument("--tokens", type=int, metavar="N", help="of each prompt (prefill 1024, decode 512, batch 128)")
    group.add_argument(
        "--vs", metavar="NAME,...",
        help="transformers-sdpa, transformers-eager, serialized (prefill only), or none (transformers-sdpa)",
    )  # fmt: skip
    group.add_argument("--runs", type=int, metavar="N", help="counted repetitions of each contender, in turns (5)")
    group.add_argument("--threads", type=int, metavar="N", help="of each process that computes (one per core)")
    group.add_argument("--dtype", metavar="|".join(DTYPES), help=f"of slots and arithmetic ({defaults.dtype})")
    group.add_argument("--device", metavar="auto|cpu|cuda[:N]", help=f"where it computes ({defaults.device})")
    group.add_argument("--timeout", dest="timeout_s", type=float, metavar="S", help="longest wait for an answer (600)")
    model = parser.add_argument_group("random weights instead of MODEL")
    model.add_argument("--shape", metavar="NAME", help="llama-3.2-1b, llama-3.1-8b or qwen2.5-0.5b")
    model.add_argument("--layers", type=int, metavar="N", help="only so many layers of it")
    output = parser.add_argument_group("output")
    output.add_argument("--json", dest="json_file", metavar="FILE", help="also write JSON; - for stdout and no table")
    output.add_argument("--plot", dest="plot_file", metavar="FILE.png", help="draw it; needs matplotlib")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser


def _verbose_flag() -> _Parser:
    parser = _Parser(add_help=False)
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the GPU process says")
    return parser


def _parser() -> _Parser:
    parser = _Parser(
        prog="tsqp-shm",
        description="Run an LLM split between a trusted process and an untrusted GPU process over shared memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tsqp-shm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    shared = [_model_argument(), _common_flags()]
    tee, gpu, verbose = _tee_flags(), _gpu_flags(), _verbose_flag()
    for name, run, parents, text in (
        ("launch", _launch, [*shared, tee, gpu, verbose], "start both processes and complete a prompt"),
        ("tee", _tee, [*shared, tee], "play the TEE role alone; a GPU process joins by --session"),
        ("gpu", _gpu, [*shared, gpu], "play the GPU role alone; a TEE process is joined by --session"),
        ("bench", _bench, [_bench_flags(), _model_argument()], "measure it beside others on the same model, in turns"),
    ):
        verb = verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=EPILOG,
            parents=parents,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.set_defaults(run=run)
    return parser
