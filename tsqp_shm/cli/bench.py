"""`tsqp-shm bench`."""

from __future__ import annotations

import argparse

from tsqp_shm.cli.flags import Parser
from tsqp_shm.cli.settings import blocked_interrupts, engine_config, model_folder
from tsqp_shm.config import DTYPES, EngineConfig
from tsqp_shm.process import Lifeline


def measure(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.bench.run import BenchOptions, run_bench

    config = engine_config(arguments)
    given = {name: getattr(arguments, name) for name in BenchOptions.__dataclass_fields__}
    chosen = {name: value for name, value in given.items() if value is not None}
    options = BenchOptions(**{**chosen, "dtype": config.dtype, "device": config.device})
    return run_bench(options, lambda: model_folder(arguments))


def bench_flags() -> Parser:
    defaults = EngineConfig()
    parser = Parser(add_help=False)
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
