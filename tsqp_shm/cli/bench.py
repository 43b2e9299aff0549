"""`tsqp-shm bench CASE`: what can be measured, and the flags of each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from tsqp_shm.cli.flags import Parser, model_argument
from tsqp_shm.cli.settings import blocked_interrupts, engine_config, model_folder
from tsqp_shm.config import DTYPES, EngineConfig
from tsqp_shm.modes import MODES
from tsqp_shm.roles.lifeline import Lifeline

SWEPT = (
    "tile_rows", "tiles_in_flight", "block_rows", "max_batch_tokens",
    "spin_us", "yield_us", "tee_threads", "gpu_threads",
)  # fmt: skip


def add_cases(verb: Parser) -> None:
    """Gives `tsqp-shm bench` its cases."""
    cases = verb.add_subparsers(metavar="CASE", required=True)
    whole = [_model_flags(), _contender_flags(), _sweep_flags(), _plot_flag(), _output_flags(), model_argument()]
    for name, run, parents, text in (
        ("prefill", _whole, [_lengths_flag(), *whole], "a prompt, to its last row's logits"),
        ("decode", _whole, [_length_flag(512), *whole], "one sequence, token by token"),
        ("batch", _whole, [_length_flag(128), *whole], "eight sequences against one, token by token"),
        ("launch", _launch, [_contender_flags(), _output_flags(), model_argument()], "process start to first text"),
        (
            "quality",
            _quality,
            [_quality_flags(), _output_flags(), model_argument()],
            "logits and words, beside float32",
        ),
        ("idle", _idle, [_idle_flags(), _output_flags(), model_argument()], "what a session takes while nobody asks"),
        ("latency", _latency, [_latency_flags(), _output_flags()], "one hand-over, beside ZeroMQ and a bare ping-pong"),
        ("waits", _waits, [_waits_flags(), _plot_flag(), _output_flags()], "a doorbell for each pair of thresholds"),
        ("kernels", _kernels, [_kernels_flags(), _output_flags()], "the TEE's kernels, beside a copy and torch"),
    ):
        case = cases.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=parents)
        case.set_defaults(run=run, case=name)


def _options(kind: type[Any], arguments: argparse.Namespace) -> Any:
    """What was given of a case's options; the rest has the defaults of its dataclass."""
    values = {name: getattr(arguments, name, None) for name in kind.__dataclass_fields__}
    if "dtype" in values:
        # Of all contenders; what one of the modes does not take is left out there.
        arguments.mode = EngineConfig.mode
        config = engine_config(arguments)
        values.update(dtype=config.dtype, device=config.device)
    return kind(**{name: value for name, value in values.items() if value is not None})


def _whole(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.run import BenchOptions, run_bench

    arguments.sweep = tuple(arguments.sweep) if arguments.sweep else None
    return run_bench(_options(BenchOptions, arguments), lambda: model_folder(arguments))


def _launch(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.first_token import LaunchOptions, run_launch

    return run_launch(_options(LaunchOptions, arguments), lambda: model_folder(arguments))


def _quality(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.quality.run import QualityOptions, run_quality

    return run_quality(_options(QualityOptions, arguments), lambda: model_folder(arguments))


def _idle(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.idle import IdleOptions, run_idle

    return run_idle(_options(IdleOptions, arguments), lambda: model_folder(arguments))


def _latency(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.latency.run import LatencyOptions, run_latency

    return run_latency(_options(LatencyOptions, arguments))


def _waits(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.latency.waits import WaitsOptions, run_waits

    return run_waits(_options(WaitsOptions, arguments))


def _kernels(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.kernels import KernelsOptions, run_kernels

    return run_kernels(_options(KernelsOptions, arguments))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _setting(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, values = text.partition("=")
    if name.replace("-", "_") not in SWEPT:
        raise ValueError
    return name.replace("-", "_"), _numbers(values)


# argparse names the type in the line for a value that is none.
_numbers.__name__ = "list of whole numbers with commas between"
_setting.__name__ = "setting, " + " or ".join(f"{name.replace('_', '-')}=N,..." for name in SWEPT)


def _flags(title: str, *flags: tuple[str, dict[str, Any]]) -> Parser:
    parser = Parser(add_help=False)
    group = parser.add_argument_group(title)
    for name, settings in flags:
        group.add_argument(name, **settings)
    return parser


def _number(help_text: str, metavar: str = "N", kind: Callable[[str], Any] = int) -> dict[str, Any]:
    return {"type": kind, "metavar": metavar, "help": help_text}


def _lengths_flag() -> Parser:
    text = "of the prompt; with several lengths, how the time grows is held against how the arithmetic does (1024)"
    return _flags("prompt", ("--tokens", _number(text, "N,...", _numbers)))


def _length_flag(default: int) -> Parser:
    return _flags("prompt", ("--tokens", _number(f"of each prompt ({default})", kind=_numbers)))


def _contender_flags() -> Parser:
    names = "transformers-sdpa, transformers-eager, serialized (prefill only), or none (transformers-sdpa)"
    return _flags(
        "contenders",
        _mode_flag(),
        ("--vs", {"metavar": "NAME,...", "help": names}),
        ("--runs", _number("counted repetitions of each contender, in turns (5)")),
        *_arithmetic_flags(),
        ("--timeout", {**_number("longest wait for an answer", "S", float), "dest": "timeout_s"}),
    )


def _quality_flags() -> Parser:
    return _flags(
        "texts and answers",
        ("--tokens", _number("of each text (2048)")),
        ("--mode", {**_number(f"a column each ({','.join(MODES)})", "NAME,...", _names), "dest": "modes"}),
        ("--max-new-tokens", _number("of each answer; 0 asks nothing (48)")),
        ("--timeout", {**_number("longest that a column may take (1800)", "S", float), "dest": "timeout_s"}),
    )


def _idle_flags() -> Parser:
    seconds = ("--seconds", _number("how long it is left alone (20)", "S", float))
    return _flags("session", _mode_flag(), seconds, *_arithmetic_flags())


def _mode_flag() -> tuple[str, dict[str, Any]]:
    text = f"of tsqp-shm, each beside the others: {', '.join(MODES)} ({EngineConfig.mode})"
    return "--mode", {**_number(text, "NAME,...", _names), "dest": "modes"}


def _arithmetic_flags() -> tuple[tuple[str, dict[str, Any]], ...]:
    defaults = EngineConfig()
    return (
        ("--dtype", {"metavar": "|".join(DTYPES), "help": f"of slots and arithmetic ({defaults.dtype})"}),
        ("--device", {"metavar": "auto|cpu|cuda[:N]", "help": f"where it computes ({defaults.device})"}),
    )


def _sweep_flags() -> Parser:
    text = "a setting of tsqp-shm and the values to measure, each as a contender; may be repeated: " + ", ".join(
        name.replace("_", "-") for name in SWEPT
    )
    return _flags(
        "settings",
        ("--threads", _number("of each process that computes (one per core)")),
        ("--sweep", {"type": _setting, "action": "append", "metavar": "NAME=N,...", "help": text}),
    )


def _model_flags() -> Parser:
    return _flags(
        "random weights instead of MODEL",
        ("--shape", {"metavar": "NAME", "help": "smollm2-135m, llama-3.2-1b, llama-3.1-8b or qwen2.5-0.5b"}),
        ("--layers", _number("only so many layers of it")),
    )


def _latency_flags() -> Parser:
    defaults = EngineConfig()
    return _flags(
        "round trips",
        ("--runs", _number("rounds (20; with --quick 2)")),
        ("--limit-s", _number("begin no round that would end later (40)", "S", float)),
        ("--quick", {"action": "store_true", "default": None, "help": "few and small: does it work at all"}),
        ("--max-bytes", _number("largest payload (64 MiB); /dev/shm holds all of them three times")),
        ("--spin-us", _number(f"spin so long ({defaults.spin_us})")),
        ("--yield-us", _number(f"then yield so long before sleeping ({defaults.yield_us})")),
    )


def _waits_flags() -> Parser:
    return _flags(
        "thresholds",
        ("--runs", _number("rounds (5)")),
        ("--spin-us", _number("to spin so long (0,2,20,200)", "N,...", _numbers)),
        ("--yield-us", _number("then to yield so long before sleeping (0,200,2000)", "N,...", _numbers)),
    )


def _kernels_flags() -> Parser:
    return _flags(
        "kernels",
        ("--shapes", _number("whose prefill (smollm2-135m,llama-3.2-1b)", "NAME,...", _names)),
        ("--tokens", _number("of the prefill (1024)")),
        ("--runs", _number("turns of each contender (10)")),
        ("--threads", _number("of our pool and of torch's (one per core)")),
    )


def _plot_flag() -> Parser:
    return _flags(
        "picture", ("--plot", {"dest": "plot_file", "metavar": "FILE.png", "help": "draw it; needs matplotlib"})
    )


def _output_flags() -> Parser:
    json_text = "also write JSON; - for stdout and no table"
    parser = _flags("output", ("--json", {"dest": "json_file", "metavar": "FILE", "help": json_text}))
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser
