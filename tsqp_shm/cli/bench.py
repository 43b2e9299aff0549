"""`tsqp-shm bench CASE`: what can be measured, and the flags of each."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from tsqp_shm.cli.bench_flags import (
    FIRST_FLAGS,
    contender_flags,
    idle_flags,
    kernels_flags,
    latency_flags,
    length_flag,
    lengths_flag,
    mode_flag,
    model_flags,
    modes_flags,
    one_mode_flag,
    output_flags,
    plot_flag,
    quality_flags,
    serve_flags,
    sweep_flags,
    waits_flags,
)
from tsqp_shm.cli.flags import model_argument
from tsqp_shm.cli.parser import Parser
from tsqp_shm.cli.settings import blocked_interrupts, engine_config, model_folder
from tsqp_shm.config import EngineConfig
from tsqp_shm.roles.lifeline import Lifeline

EXAMPLES = """\
tsqp-shm bench modes                  every mode of tsqp-shm side by side, and where each pays
tsqp-shm bench decode                 this split beside transformers
tsqp-shm bench prefill --mode verified --vs none --sweep block-rows=64,128,256
tsqp-shm bench launch --mode plain,tee-only --vs none
"""
SERVE_EXAMPLES = """\
tsqp-shm bench serve --json serve.json --plot serve.png
tsqp-shm bench serve --peer vllm=VENV/bin/python --peer transformers=VENV/bin/python
tsqp-shm bench serve --peer llamacpp=VENV/bin/python --gguf model-bf16.gguf --clients 8,32
"""
MODES_DESCRIPTION = """\
Every mode of tsqp-shm side by side: a prompt, tokens of one sequence, tokens of eight; bytes over the border, \
processor time and pads. Contenders take turns, and who has none is stopped. blinded is there twice:

  stocked: the pads of every row are made before a run begins; a run that lacked one would fail
  sustained: no stock to begin with: what has no pad waits for one, so tokens/s is capped by pads/s

Then a forecast of where each mode pays, made of this machine's measured costs and of stated assumptions of others: by \
GPU, cores, model, batch and stock it says whether blinded or tee-only is the faster one.
"""
MODES_EXAMPLES = """\
tsqp-shm bench modes --json modes.json --plot modes.png
tsqp-shm bench modes --shape llama-3.2-1b --runs 3
tsqp-shm bench modes --assume memory-gb-s=90,gpu-gb=48,gpu-gb-s=864,gpu-tmac-s=181,bus-gb-s=25
"""


def add_cases(verb: Parser) -> None:
    """Gives `tsqp-shm bench` its cases."""
    verb.epilog = f"examples:\n{textwrap.indent(EXAMPLES, '  ')}"
    cases = verb.add_subparsers(metavar="CASE", required=True)
    ends = [output_flags(), model_argument()]
    whole = [model_flags(), contender_flags(one_mode_flag()), sweep_flags(), plot_flag(), *ends]
    for name, run, parents, text in (
        (
            "modes",
            _modes,
            [modes_flags(), model_flags(), plot_flag(), *ends],
            "the modes side by side, and a forecast of where each pays",
        ),
        ("prefill", _whole, [lengths_flag(), *whole], "a prompt, to its last row's logits"),
        ("decode", _whole, [length_flag(512), *whole], "one sequence, token by token"),
        ("batch", _whole, [length_flag(128), *whole], "eight sequences against one, token by token"),
        (
            "serve",
            _serve,
            [serve_flags(), plot_flag(), *ends],
            "many clients of a server, beside other engines' servers",
        ),
        ("launch", _launch, [contender_flags(mode_flag()), *ends], "process start to first text"),
        ("quality", _quality, [quality_flags(), *ends], "logits and words, beside float32"),
        ("idle", _idle, [idle_flags(), *ends], "what a session takes while nobody asks"),
        ("latency", _latency, [latency_flags(), output_flags()], "one hand-over, beside ZeroMQ and a bare ping-pong"),
        ("waits", _waits, [waits_flags(), plot_flag(), output_flags()], "a doorbell for each pair of thresholds"),
        ("kernels", _kernels, [kernels_flags(), output_flags()], "the TEE's kernels, beside a copy and torch"),
    ):
        case = cases.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=parents)
        case.put_first(FIRST_FLAGS)
        case.set_defaults(run=run, case=name, prog=case.prog)
        if name == "modes":
            case.description = MODES_DESCRIPTION
            case.epilog = f"examples:\n{textwrap.indent(MODES_EXAMPLES, '  ')}"
        if name == "serve":
            case.epilog = f"examples:\n{textwrap.indent(SERVE_EXAMPLES, '  ')}"


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


def _modes(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.modes.run import ModesOptions, run_modes

    return run_modes(_options(ModesOptions, arguments), lambda: model_folder(arguments))


def _launch(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.first_token import LaunchOptions, run_launch

    return run_launch(_options(LaunchOptions, arguments), lambda: model_folder(arguments))


def _serve(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.serve.run import ServeOptions, run_serve

    for name in ("peers", "clients", "temperatures"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, tuple(getattr(arguments, name)))
    return run_serve(_options(ServeOptions, arguments), lambda: model_folder(arguments))


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
