#!/usr/bin/env python3
"""What a token costs the sampler, rule by rule: one row of logits, one thread, medians in milliseconds.

    scripts/bench_sampler.py [--vocab V] [--calls N] [--history T]

Rows are drawn from normal distributions; `peaked` has a thousandth of its tokens far above the others, as a model's
rows have. Needs no model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tsqp_shm import _native
from tsqp_shm.bench.report import environment

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=152_064, metavar="V")
    parser.add_argument("--calls", type=int, default=100, metavar="N")
    parser.add_argument("--history", type=int, default=4096, metavar="T", help="tokens of prompt and answer, each half")
    arguments = parser.parse_args()
    _native.set_num_threads(1)
    rows = distributions(arguments.vocab)
    history = np.random.default_rng(1).integers(0, arguments.vocab, arguments.history).tolist()
    half = len(history) // 2
    for name, fact in environment().items():
        print(f"{name}: {fact}")
    print(f"\n| ms a row, V = {arguments.vocab:,}, {_native.active_instruction_set()} | {' | '.join(rows)} |")
    print(f"|{'---|' * (len(rows) + 1)}")
    token = np.array([half], np.int32)
    for name, rules in RULES.items():
        sampler = _native.TokenSampler(arguments.vocab, history[:half], **rules)
        for said in history[half:]:
            sampler.grow(said)
        found = [draw_ms(row, sampler, arguments.calls) for row in rows.values()]
        print(f"| {name} | {' | '.join(f'{ms:.3f}' for ms in found)} |")
    found = [score_ms(row, token, arguments.calls) for row in rows.values()]
    print(f"| log probabilities of 20 | {' | '.join(f'{ms:.3f}' for ms in found)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
