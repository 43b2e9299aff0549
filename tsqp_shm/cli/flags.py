"""The flags that verbs share, in groups. Their defaults are read from the settings they set."""

from __future__ import annotations

import argparse
from pathlib import Path

from tsqp_shm.cli.parser import Parser
from tsqp_shm.config import (
    BLOCK_ROWS,
    CHECKED_BLOCK_ROWS,
    DEFAULT_MAX_MODEL_LEN,
    DOORBELLS,
    DTYPES,
    LARGE_LAYER_BLOCK_ROWS,
    LARGE_LAYER_PARAMETERS,
    PADS_OUT,
    PINNINGS,
    PREFILLS,
    EngineConfig,
)
from tsqp_shm.modes import MODES

DEFAULT_PROMPT = "The capital of Italy is"
DEFAULT_QUESTION = "What is the capital of France?"


_FIRST_OF_PROMPT = ("--prompt", "--prompt-file", "--chat", "--interactive", "--system")
_FIRST_OF_SESSION = (
    "--mode", "--device", "--max-new-tokens", "--temperature", "--top-p", "--seed", "--max-model-len",
    "--json", "--quiet", "--verbose",
)  # fmt: skip
# What `--help` of a verb shows, in this order; the verb's `--help-all` shows the rest behind it.
FIRST_FLAGS = {
    "launch": ("model", *_FIRST_OF_PROMPT, *_FIRST_OF_SESSION),
    "tee": ("model", "--session", *_FIRST_OF_PROMPT, *_FIRST_OF_SESSION),
    "gpu": ("model", "--session", "--device", "--quiet"),
    "serve": (
        "model",
        "--mode",
        "--device",
        "--host",
        "--port",
        "--api-key",
        "--served-model-name",
        "--max-model-len",
        "--max-num-seqs",
        "--config",
        "--quiet",
    ),
    "doctor": ("model", "--mode", "--device", "--max-model-len", "--max-num-seqs", "--json"),
}


def model_argument() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a Hugging Face folder, or an id in the local cache; without it, the demo model is fetched and used",
    )
    return parser


def common_flags() -> Parser:
    defaults = EngineConfig()
    parser = Parser(add_help=False)
    group = parser.add_argument_group("session")
    group.add_argument("--session", metavar="NAME", help="the name under which the two processes meet")
    group.add_argument(
        "--timeout",
        dest="timeout_s",
        type=float,
        metavar="S",
        help=f"longest that a step, or a start, waits for the other process ({defaults.timeout_s:.0f} s)",
    )
    _output(parser).add_argument("-q", "--quiet", action="store_true", help="print the completion and errors only")
    return parser


def gpu_flags() -> Parser:
    defaults = EngineConfig()
    parser = Parser(add_help=False)
    group = parser.add_argument_group("GPU process")
    group.add_argument("--device", metavar="auto|cpu|cuda[:N]", help=f"where it computes ({defaults.device})")
    group.add_argument(
        "--pinning", metavar="|".join(PINNINGS),
        help="how a CUDA device reaches the arena: registered with the driver, staged through pinned memory, pageable; "
        f"{defaults.pinning}: the first of these that can be had ({defaults.pinning})",
    )  # fmt: skip
    group.add_argument("--gpu-threads", type=int, metavar="N", help="its threads on the CPU (one per core)")
    return parser


def tee_flags() -> Parser:
    parser = Parser(add_help=False, parents=[prompt_flags(), arena_flags(), pad_flags(), doorbell_flags(), json_flag()])
    # None and not False where it is not given, as the environment may say so.
    parser.add_argument_group("checks").add_argument(
        "--check-finite", action="store_true", default=None,
        help="look for NaN and infinities in every result, and name the operation and layer of the first",
    )  # fmt: skip
    trust = add_trust(parser)
    trust.add_argument(
        "--transcript", type=Path, metavar="FILE",
        help="write every word of every product, for scripts/check_transcript.py; prompts can be found in it",
    )  # fmt: skip
    return parser


def evidence_flags() -> Parser:
    parser = Parser(add_help=False)
    add_trust(parser)
    return parser


def add_trust(parser: Parser) -> argparse._ArgumentGroup:
    trust = parser.add_argument_group("what an answer can be held to, in modes that compute with weights in int8")
    trust.add_argument(
        "--model-digest", metavar="sha256:HEX",
        help="start with this model only, as tsqp-shm inspect --digest names it (as it is found)",
    )  # fmt: skip
    trust.add_argument(
        "--evidence", type=Path, metavar="FILE.json",
        help="write how each request was computed and checked, and what opens it to its requester to FILE.nonces.json",
    )  # fmt: skip
    return trust


def prompt_flags() -> Parser:
    parser = Parser(add_help=False)
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--prompt", metavar="TEXT",
        help=f"what to complete ({DEFAULT_PROMPT!r}), or with --chat to answer ({DEFAULT_QUESTION!r})",
    )  # fmt: skip
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file, or from - (stdin)")
    prompt.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompt")
    prompt.add_argument(
        "--interactive", action="store_true",
        help="a chat, turn by turn; Ctrl-C cuts an answer short, Ctrl-D ends the chat",
    )  # fmt: skip
    prompt.add_argument("--system", metavar="TEXT", help="what a chat begins with, as the model's system message")
    prompt.add_argument(
        "--keep-history", action="store_true",
        help="keep the lines that are typed into a chat for the next ones, in a file that is this user's alone, "
        "~/.local/state/tsqp-shm/history (in memory, and not beyond the chat)",
    )  # fmt: skip

    sampling = parser.add_argument_group(
        "sampling", "where a flag is not given, as the model's generation_config.json says, else as in brackets"
    )
    sampling.add_argument(
        "--max-new-tokens",
        dest="max_tokens",
        type=int,
        metavar="N",
        help="most tokens to generate (64; in a chat as many as there is room for)",
    )
    sampling.add_argument(
        "--min-new-tokens", dest="min_tokens", type=int, metavar="N", help="fewest tokens to generate (0)"
    )
    sampling.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest token (0)")
    sampling.add_argument("--top-p", type=float, metavar="X", help="sample within this probability (1)")
    sampling.add_argument("--top-k", type=int, metavar="N", help="sample among N tokens; 0: all (0)")
    sampling.add_argument(
        "--min-p", type=float, metavar="X", help="sample among tokens of this share of the likeliest one's (0)"
    )
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 repeats less (1)")
    sampling.add_argument(
        "--presence-penalty", type=float, metavar="X", help="above 0 repeats less, -2 to 2; the answer alone counts (0)"
    )
    sampling.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="the same, as often as a token was said (0)"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable; --json tells which it was")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="ends the completion; may be repeated")
    sampling.add_argument(
        "--stop-token-ids", action="append", type=int, metavar="ID",
        help="a token that ends the completion; may be repeated",
    )  # fmt: skip
    sampling.add_argument(
        "--include-stop", dest="include_stop_str_in_output", action="store_true",
        help="print what has stopped the completion, too",
    )  # fmt: skip
    sampling.add_argument("--bad-words", action="append", metavar="TEXT", help="is not said; may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    sampling.add_argument(
        "--deadline", dest="deadline_s", type=float, metavar="S", help="end a completion after so many seconds (none)"
    )
    return parser


def add_limits(group: argparse._ArgumentGroup) -> None:
    """What decides how much memory a session takes."""
    defaults = EngineConfig()
    group.add_argument(
        "--max-model-len", type=int, metavar="N",
        help=f"longest prompt and completion, in tokens (the model's, at most {DEFAULT_MAX_MODEL_LEN})",
    )  # fmt: skip
    group.add_argument("--max-num-seqs", type=int, metavar="N", help=f"sequences at once ({defaults.max_num_seqs})")
    group.add_argument(
        "--max-batch-tokens", type=int, metavar="N",
        help=f"tokens in one forward pass; longer prompts go in chunks ({defaults.max_batch_tokens})",
    )  # fmt: skip


def add_scheduling(group: argparse._ArgumentGroup) -> None:
    """Who waits for whom, and what is computed again."""
    defaults = EngineConfig()
    group.add_argument(
        "--prefill-budget", type=int, metavar="N",
        help="tokens of prompts in a forward pass in which answers go on, so that none stands still for the whole of a "
        f"prompt; 0: as many as fit ({defaults.prefill_budget})",
    )  # fmt: skip
    group.add_argument(
        "--prefix-reuse", action=argparse.BooleanOptionalAction, default=None,
        help="keep a conversation's cache between its turns and compute what is new; the length of that shows to who "
        "sees lengths (on; off in mode blinded)",
    )  # fmt: skip


def arena_flags() -> Parser:
    defaults = EngineConfig()
    parser = Parser(add_help=False)
    model = parser.add_argument_group("model and arena")
    model.add_argument(
        "--mode",
        metavar="|".join(MODES),
        help=f"what crosses to the GPU process, if there is one, and so is protected ({defaults.mode})",
    )  # fmt: skip
    model.add_argument("--dtype", metavar="|".join(DTYPES), help=f"of slots and arithmetic ({defaults.dtype})")
    add_limits(model)
    add_scheduling(model)
    model.add_argument("--tile-rows", type=int, metavar="N", help=f"rows of an attention tile ({defaults.tile_rows})")
    model.add_argument("--tiles-in-flight", type=int, metavar="N", help=f"score slots ({defaults.tiles_in_flight})")
    model.add_argument(
        "--block-rows", type=int, metavar="N",
        help=f"rows that go through the layers together ({BLOCK_ROWS}; {CHECKED_BLOCK_ROWS} where products are "
        f"checked; {LARGE_LAYER_BLOCK_ROWS:,} where a layer has more than {LARGE_LAYER_PARAMETERS >> 20} Mi weights)",
    )  # fmt: skip
    model.add_argument(
        "--float32-rows", type=int, metavar="N",
        help="a step of at most so many rows has its activations in float32, also where the dtype is bfloat16 "
        f"({defaults.float32_rows})",
    )  # fmt: skip
    model.add_argument(
        "--tee-threads", type=int, metavar="N",
        help="threads of the TEE's kernels (one for two cores; one per core without a GPU process)",
    )  # fmt: skip
    model.add_argument(
        "--restart-gpu", type=int, metavar="N",
        help=f"go on with another GPU process where one dies, up to N times ({defaults.restart_gpu})",
    )  # fmt: skip
    return parser


def pad_flags() -> Parser:
    defaults = EngineConfig()
    parser = Parser(add_help=False)
    pads = parser.add_argument_group("pads of mode blinded, of which each row that crosses takes one and burns it")
    pads.add_argument(
        "--pad-stock", metavar="ROWS|SIZE",
        help="how many are kept ready: 4096 for so many rows through the model, 2GiB for what goes there (as many as "
        "the longest sequence has rows, at most a quarter of the memory that is free)",
    )  # fmt: skip
    pads.add_argument(
        "--pad-threads", type=int, metavar="N",
        help=f"threads that make them while nobody else wants the core ({defaults.pad_threads})",
    )  # fmt: skip
    pads.add_argument(
        "--pad-ready",
        type=int,
        metavar="ROWS",
        help=f"how many to wait for before a first prompt ({defaults.pad_ready})",
    )
    pads.add_argument(
        "--pads-out", metavar="|".join(PADS_OUT),
        help="what has no pad: computed in the TEE process, waits for pads, or is refused; the text is the same "
        f"({defaults.pads_out})",
    )  # fmt: skip
    pads.add_argument(
        "--prefill", metavar="|".join(PREFILLS),
        help="where prompts are computed; auto: by the GPU process where the stock covers them "
        f"({defaults.prefill})",
    )  # fmt: skip
    pads.add_argument(
        "--pad-prompt-to", type=int, metavar="N",
        help="have prompts look as if their length were the next multiple of N tokens, at the cost of these; no scores "
        "of prompts then (0: off)",
    )  # fmt: skip
    pads.add_argument(
        "--lock-memory", action="store_true", default=None,
        help="keep stock, slots and caches from being swapped too, as far as ulimit -l goes; keys always are",
    )  # fmt: skip
    return parser


def doorbell_flags() -> Parser:
    defaults = EngineConfig()
    parser = Parser(add_help=False)
    bell = parser.add_argument_group("doorbell")
    bell.add_argument(
        "--doorbell", metavar="|".join(DOORBELLS),
        help=f"how a side waits: rings and ZeroMQ for sleepers, ZeroMQ alone, or never asleep ({defaults.doorbell})",
    )  # fmt: skip
    bell.add_argument("--endpoint", metavar="URL", help="ipc://PATH or tcp://127.0.0.1:PORT (a socket of the session)")
    bell.add_argument("--spin-us", type=int, metavar="N", help=f"spin so long before yielding ({defaults.spin_us})")
    bell.add_argument("--yield-us", type=int, metavar="N", help=f"yield so long before sleeping ({defaults.yield_us})")
    return parser


def json_flag() -> Parser:
    parser = Parser(add_help=False)
    _output(parser).add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    return parser


def verbose_flag() -> Parser:
    parser = Parser(add_help=False)
    _output(parser).add_argument(
        "-v", "--verbose", action="store_true",
        help="say more: all that was brought up, tables of what was done, what the GPU process prints",
    )  # fmt: skip
    return parser


def _output(parser: Parser) -> argparse._ArgumentGroup:
    return parser.add_argument_group("output")
