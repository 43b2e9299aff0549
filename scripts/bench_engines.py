#!/usr/bin/env python3
"""Prefill and decode of one sequence beside llama.cpp and OpenVINO GenAI on the same weights, in turns.

    scripts/bench_engines.py --modes plain,tee-only    # this system alone
    scripts/bench_engines.py --engines VENV/bin/python --gguf q8_0.gguf

VENV has `pip install xllamacpp openvino-genai`. Each GGUF is given to llama.cpp, and to OpenVINO where it reads that
type (it does not read BF16). Each contender is a process that loads its model once and is stopped (SIGSTOP) while it is
not its turn. llama.cpp and OpenVINO are timed by their own counters, which leave tokenizing out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from script_flags import ScriptParser, positive
from turns import Contender, play, print_rows


def token_ids(settings: dict[str, Any], order: dict[str, int]) -> list[int]:
    """Another prompt in each round: an engine may keep what it has computed."""
    drawn = random.Random(order["round"])
    return [drawn.randrange(settings["vocabulary"]) for _ in range(order["tokens"])]


def play_ours(settings: dict[str, Any], mode: str) -> Any:
    from queue import SimpleQueue

    from tsqp_shm import LLM, SamplingParams
    from tsqp_shm.tee.updates import Update

    llm = LLM(settings["model"], mode=mode, max_model_len=settings["positions"], max_num_seqs=1)

    def answer(order: dict[str, int]) -> float:
        import time

        params = SamplingParams(max_tokens=order["new"] + 1, ignore_eos=True, temperature=0, detokenize=False)
        updates: SimpleQueue[Update] = SimpleQueue()
        started_s = time.perf_counter()
        llm.runtime.add([llm.start(token_ids(settings, order), params)], updates.put)
        made = 0
        while made <= order["new"]:
            made += len(llm.runtime.next_update(updates).token_ids)
            if made == 1:
                first_s = time.perf_counter()
        prefill_s, decode_s = first_s - started_s, time.perf_counter() - first_s
        return 1e3 * (decode_s / order["new"] if order["new"] else prefill_s)

    return answer


def play_llama(settings: dict[str, Any], gguf: str) -> Any:
    import xllamacpp  # type: ignore[import-not-found]

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx = settings["positions"]
    params.n_parallel = 1
    params.n_batch = params.n_ubatch = 1024
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.warmup = False
    server = xllamacpp.Server(params)

    def answer(order: dict[str, int]) -> float:
        result = server.handle_completions(
            {
                "prompt": token_ids(settings, order),
                "n_predict": order["new"] + 1,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
                "timings_per_token": False,
            }
        )
        timings = result["timings"]
        assert timings["prompt_n"] == order["tokens"], timings
        return float(timings["predicted_per_token_ms"] if order["new"] else timings["prompt_ms"])

    return answer


def play_openvino(settings: dict[str, Any], gguf: str) -> Any:
    import numpy as np
    import openvino  # type: ignore[import-not-found]
    import openvino_genai  # type: ignore[import-not-found]

    pipeline = openvino_genai.LLMPipeline(gguf, "CPU", INFERENCE_NUM_THREADS=settings["threads"])

    def answer(order: dict[str, int]) -> float:
        ids = np.array([token_ids(settings, order)], np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig(
            max_new_tokens=order["new"] + 1, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        metrics = pipeline.generate(inputs, config).perf_metrics
        return float(metrics.get_tpot().mean if order["new"] else metrics.get_ttft().mean)

    return answer


PLAYERS = {"tsqp-shm": play_ours, "llama.cpp": play_llama, "openvino": play_openvino}


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("model", nargs="?", help="a folder (the demo model)")
    parser.add_argument(
        "--engines", metavar="PYTHON", help="the interpreter of a venv with xllamacpp and openvino-genai"
    )
    parser.add_argument("--gguf", action="append", default=[], metavar="FILE", help="the same weights; may be repeated")
    parser.add_argument(
        "--modes", default="plain", metavar="NAME,...", help="of this system, with commas between (plain)"
    )
    parser.add_argument("--prefill", type=positive, default=1024, metavar="TOKENS", help="of the prompt (1024)")
    parser.add_argument("--decode-at", type=positive, default=512, metavar="TOKENS", help="context to decode at (512)")
    parser.add_argument("--new-tokens", type=positive, default=32, metavar="N", help="decoded there (32)")
    parser.add_argument(
        "--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N",
        help="of the other engines (one per core)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="turns of each that count (7)")
    parser.add_argument("--json", metavar="PREFIX", help="writes PREFIX.prefill.json and PREFIX.decode.json")
    parser.add_argument("--play", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        settings = json.loads(arguments.play[1])
        play(PLAYERS[arguments.play[0]](settings, settings["of"]))
        return 0
    from tsqp_shm.bench.tables import say
    from tsqp_shm.demo.model import demo_model_folder
    from tsqp_shm.model.spec import ModelSpec

    model = Path(arguments.model) if arguments.model else demo_model_folder()
    orders = {
        "prefill": {"tokens": arguments.prefill, "new": 0},
        "decode": {"tokens": arguments.decode_at, "new": arguments.new_tokens},
    }
    settings = {
        "model": str(model),
        "vocabulary": ModelSpec.from_folder(model).vocab_size,
        "positions": max(arguments.prefill + 1, arguments.decode_at + arguments.new_tokens + 1) + 63 & ~63,
        "threads": arguments.threads,
    }
    wanted = [("tsqp-shm", mode, sys.executable) for mode in arguments.modes.split(",")]
    for gguf in arguments.gguf if arguments.engines else []:
        wanted.append(("llama.cpp", gguf, arguments.engines))
        if "bf16" not in Path(gguf).name.lower():
            wanted.append(("openvino", gguf, arguments.engines))
    rows: dict[str, dict[str, list[float]]] = {name: {} for name in orders}
    with ExitStack() as stack:
        contenders = [
            stack.enter_context(
                closing(Contender(f"{kind} {Path(of).stem}", python, __file__, kind, {**settings, "of": of}))
            )
            for kind, of, python in wanted
        ]
        for number in range(arguments.rounds + 1):
            for case, order in orders.items():
                for contender in contenders[:: 1 if number % 2 else -1]:
                    sample = contender.turn({**order, "round": number})
                    if number:
                        rows[case].setdefault(contender.name, []).append(sample)
    for case, order in orders.items():
        what = "a prompt" if case == "prefill" else "a token at context"
        print()
        say(f"{case}: {what} of {order['tokens']} tokens, one sequence, {arguments.threads} threads")
        ordered = {contender.name: rows[case][contender.name] for contender in contenders}
        print_rows(ordered, "ms", f"{arguments.json}.{case}.json" if arguments.json else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
