#!/usr/bin/env python3
"""What a token costs the sampler, rule by rule: one row of logits, one thread, medians in milliseconds.

    scripts/bench_sampler.py
    scripts/bench_sampler.py --vocab 49152 --calls 20

Rows are drawn from normal distributions; `peaked` has a thousandth of its tokens far above the others, as a model's
rows have. Needs no model.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from script_flags import ScriptParser, positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tsqp_shm import _native
from tsqp_shm.bench.report import environment
from tsqp_shm.bench.tables import print_columns, say, say_facts

RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "top_k 50, top_p 0.95": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "three penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
}


def distributions(vocab: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    rows = {f"deviation {spread}": random.normal(0, spread, vocab) for spread in (1, 2, 4)}
    rows["peaked"] = np.where(random.random(vocab) < 0.001, random.normal(12, 2, vocab), random.normal(-2, 2, vocab))
    return {name: row.astype(np.float32)[None] for name, row in rows.items()}


def median_ms(act: Callable[[], object], calls: int) -> float:
    times = []
    for _ in range(calls):
        started_s = time.perf_counter()
        act()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times) * 1e3


def draw_ms(row: np.ndarray, sampler: _native.TokenSampler, calls: int) -> float:
    return median_ms(lambda: _native.draw_tokens(row, [sampler]), calls)


def score_ms(row: np.ndarray, token: np.ndarray, calls: int) -> float:
    return median_ms(lambda: _native.score_tokens(row, token, 20), calls)


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("--vocab", type=positive, default=152_064, metavar="V", help="tokens of a row (152064)")
    parser.add_argument("--calls", type=positive, default=100, metavar="N", help="of each rule (100)")
    parser.add_argument(
        "--history", type=positive, default=4096, metavar="T", help="tokens of prompt and answer, each half (4096)"
    )
    arguments = parser.parse_args()
    _native.set_num_threads(1)
    rows = distributions(arguments.vocab)
    history = np.random.default_rng(1).integers(0, arguments.vocab, arguments.history).tolist()
    half = len(history) // 2
    say_facts({**environment(), "kernels": _native.active_instruction_set()})
    token, cells = np.array([half], np.int32), []
    for name, rules in RULES.items():
        sampler = _native.TokenSampler(arguments.vocab, history[:half], **rules)
        for said in history[half:]:
            sampler.grow(said)
        cells.append([name, *(f"{draw_ms(row, sampler, arguments.calls):.3f}" for row in rows.values())])
    found = [f"{score_ms(row, token, arguments.calls):.3f}" for row in rows.values()]
    cells.append(["log probabilities of 20", *found])
    print()
    say(f"milliseconds a row of {arguments.vocab:,} logits")
    print_columns(["", *rows], cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
