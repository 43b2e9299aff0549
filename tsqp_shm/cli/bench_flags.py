"""The flags of `tsqp-shm bench`, in groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tsqp_shm.cli.parser import Parser
from tsqp_shm.config import DTYPES, EngineConfig
from tsqp_shm.modes import MODES

# A name, and what argparse is told of it.
Flag = tuple[str, dict[str, Any]]
SWEPT = (
    "tile_rows", "tiles_in_flight", "block_rows", "float32_rows", "max_batch_tokens",
    "spin_us", "yield_us", "tee_threads", "gpu_threads",
)  # fmt: skip

# What `--help` of a case shows, in this order; its `--help-all` shows the rest behind it.
FIRST_FLAGS = (
    "model", "--mode", "--vs", "--tokens", "--new-tokens", "--max-new-tokens", "--seconds", "--runs", "--quick",
    "--shape", "--shapes", "--sweep", "--peer", "--gguf", "--clients", "--json", "--plot", "--quiet",
)  # fmt: skip


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _setting(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, values = text.partition("=")
    if name.replace("-", "_") not in SWEPT:
        raise ValueError
    return name.replace("-", "_"), _numbers(values)


def _decimals(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _peer(text: str) -> tuple[str, str]:
    name, found, python = text.partition("=")
    if not found or not python:
        raise ValueError
    return name, python


# argparse names the type in the line for a value that is none.
_numbers.__name__ = "list of whole numbers with commas between"
_decimals.__name__ = "list of numbers with commas between"
_peer.__name__ = "server, NAME=PYTHON"
_setting.__name__ = "setting, " + " or ".join(f"{name.replace('_', '-')}=N,..." for name in SWEPT)


def _flags(title: str, *flags: Flag) -> Parser:
    parser = Parser(add_help=False)
    group = parser.add_argument_group(title)
    for name, settings in flags:
        group.add_argument(name, **settings)
    return parser


def _number(help_text: str, metavar: str = "N", kind: Callable[[str], Any] = int) -> dict[str, Any]:
    return {"type": kind, "metavar": metavar, "help": help_text}


def lengths_flag() -> Parser:
    text = "of the prompt; with several lengths, how the time grows is held against how the arithmetic does (1024)"
    return _flags("prompt", ("--tokens", _number(text, "N,...", _numbers)))


def length_flag(default: int) -> Parser:
    return _flags("prompt", ("--tokens", _number(f"of each prompt ({default})", kind=_numbers)))


def contender_flags(mode: Flag) -> Parser:
    names = "transformers-sdpa, transformers-eager, serialized (prefill only), or none (transformers-sdpa)"
    return _flags(
        "contenders",
        mode,
        ("--vs", {"metavar": "NAME,...", "help": names}),
        ("--runs", _number("counted repetitions of each contender, in turns (5)")),
        *_arithmetic_flags(),
        ("--timeout", {**_number("longest wait for an answer", "S", float), "dest": "timeout_s"}),
    )


def quality_flags() -> Parser:
    return _flags(
        "texts and answers",
        ("--tokens", _number("of each text; 0 reads none (2048)")),
        ("--mode", {**_number(f"a column each ({','.join(MODES)})", "NAME,...", _names), "dest": "modes"}),
        ("--max-new-tokens", _number("of each answer; 0 asks nothing (48)")),
        ("--questions", {"metavar": "FILE", "help": "with one question a line (twenty plain ones)"}),
        ("--float32-rows", _number(f"of plain, as launch has it ({EngineConfig.float32_rows})")),
        ("--no-chat", {"action": "store_true", "help": "asks them as they are, without the model's chat template"}),
        ("--timeout", {**_number("longest that a column may take (1800)", "S", float), "dest": "timeout_s"}),
    )


def idle_flags() -> Parser:
    seconds = ("--seconds", _number("how long it is left alone (20)", "S", float))
    return _flags("session", mode_flag(), seconds, *_arithmetic_flags())


def modes_flags() -> Parser:
    tokens = "of the prompt, in front of one sequence's tokens and of eight sequences' (1024,512,128)"
    assume = (
        "forecast for a machine of your own too, which is machine B but for what is named: cores, memory-gb-s, "
        "digit-gmac-s (int8 multiplications of a core), gpu-gb, gpu-gb-s, gpu-tmac-s, bus-gb-s, round-trip-us"
    )
    return _flags(
        "modes",
        ("--mode", {**_number(f"which of them ({','.join(MODES)})", "NAME,...", _names), "dest": "modes"}),
        ("--tokens", _number(tokens, "N,N,N", _numbers)),
        ("--new-tokens", _number("of each sequence, timed; sustained has its own number (32)")),
        ("--runs", _number("counted repetitions of each, in turns (5)")),
        (
            "--threads",
            _number("of the GPU process and of tee-only; the TEE process beside one has half (one per core)"),
        ),
        ("--pad-threads", _number("that make pads, when nobody else wants the core (one per core)")),
        *_arithmetic_flags(),
        ("--assume", _number(assume, "NAME=X,...", str)),
        ("--timeout", {**_number("longest wait for an answer", "S", float), "dest": "timeout_s"}),
    )


def serve_flags() -> Parser:
    peer = (
        "another engine's server, and the Python of the venv that has it; may be repeated: transformers, "
        "transformers-batching (its continuous batching), vllm, llamacpp (by xllamacpp, with --gguf)"
    )
    return _flags(
        "servers and clients",
        mode_flag(),
        ("--peer", {"type": _peer, "action": "append", "metavar": "NAME=PYTHON", "help": peer, "dest": "peers"}),
        ("--gguf", {"metavar": "FILE", "help": "the same weights for llama.cpp"}),
        ("--clients", _number("how many ask at once (1,8,32)", "N,...", _numbers)),
        ("--temperatures", _number("of their requests (0,1)", "X,...", _decimals)),
        ("--tokens", _number("of each prompt (128)")),
        ("--new-tokens", _number("of each answer (64)")),
        ("--requests", _number("of each client, one after another (2)")),
        ("--runs", _number("counted rounds, in turns (3)")),
        ("--threads", _number("of each process that computes; of a TEE process beside one, half (one per core)")),
        *_arithmetic_flags(),
        ("--timeout", {**_number("longest wait for a server, and for a turn (900)", "S", float), "dest": "timeout_s"}),
    )


def one_mode_flag() -> Flag:
    return "--mode", {"metavar": "NAME", "help": f"of tsqp-shm: {', '.join(MODES)} ({EngineConfig.mode})"}


def mode_flag() -> Flag:
    text = f"of tsqp-shm, each beside the others: {', '.join(MODES)} ({EngineConfig.mode})"
    return "--mode", {**_number(text, "NAME,...", _names), "dest": "modes"}


def _arithmetic_flags() -> tuple[Flag, ...]:
    defaults = EngineConfig()
    return (
        ("--dtype", {"metavar": "|".join(DTYPES), "help": f"of slots and arithmetic ({defaults.dtype})"}),
        ("--device", {"metavar": "auto|cpu|cuda[:N]", "help": f"where it computes ({defaults.device})"}),
    )


def sweep_flags() -> Parser:
    text = "a setting of tsqp-shm and the values to measure, each as a contender; may be repeated: " + ", ".join(
        name.replace("_", "-") for name in SWEPT
    )
    return _flags(
        "settings",
        ("--threads", _number("of each process that computes (one per core)")),
        ("--sweep", {"type": _setting, "action": "append", "metavar": "NAME=N,...", "help": text}),
    )


def model_flags() -> Parser:
    return _flags(
        "random weights instead of MODEL",
        (
            "--shape",
            {"metavar": "NAME", "help": "smollm2-135m, qwen2.5-0.5b, llama-3.2-1b, -3.1-8b or -3.1-70b"},
        ),
        ("--layers", _number("only so many layers of it")),
    )


def latency_flags() -> Parser:
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


def waits_flags() -> Parser:
    return _flags(
        "thresholds",
        ("--runs", _number("rounds (5)")),
        ("--spin-us", _number("to spin so long (0,2,20,200)", "N,...", _numbers)),
        ("--yield-us", _number("then to yield so long before sleeping (0,200,2000)", "N,...", _numbers)),
    )


def kernels_flags() -> Parser:
    return _flags(
        "kernels",
        ("--shapes", _number("whose prefill (smollm2-135m,llama-3.2-1b)", "NAME,...", _names)),
        ("--tokens", _number("of the prefill (1024)")),
        ("--runs", _number("turns of each contender (10)")),
        ("--threads", _number("of our pool and of torch's (one per core)")),
    )


def plot_flag() -> Parser:
    return _flags(
        "picture", ("--plot", {"dest": "plot_file", "metavar": "FILE.png", "help": "draw it; needs matplotlib"})
    )


def output_flags() -> Parser:
    json_text = "also write JSON; - for stdout and no table"
    parser = _flags("output", ("--json", {"dest": "json_file", "metavar": "FILE", "help": json_text}))
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser
