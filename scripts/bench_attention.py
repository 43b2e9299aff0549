#!/usr/bin/env python3
"""What attention over the private cache takes, beside a plain read of the same bytes by the same threads.

    scripts/bench_attention.py
    scripts/bench_attention.py --rounds 20 --shape SmolLM2-135M --json FILE

Decode: one row of each sequence, after 100 MB of other data went through the processor's cache, and then the cache of
"the layer before", of the same shape: the data are cold, while code and buffers are as they are between two layers of
a step. Attention and read in turns in one process; medians, the median of each round's ratio, and the ratio of the
fastest tenths, which other programs on the machine disturb least. Prefill: 1,024 tokens of one sequence, all layers
of the shape; the median, and the sum of each layer's least. Needs no model.
"""

from __future__ import annotations

import json
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from script_flags import ScriptParser, positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tsqp_shm import _native
from tsqp_shm.bench.report import environment
from tsqp_shm.bench.tables import print_columns, say_facts

F32, SLOTS_OFFSET, PAGE, BLOCK = 2, 16384, 4096, 64
OTHER_BYTES = 100_000_000
# As the GPU process's pool waits: threads that sleep between two calls of a step cost more than the call.
PATIENCE_US = 200


class Shape(NamedTuple):
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "SmolLM2-135M": Shape(30, 9, 3, 64),
    "Qwen2.5-0.5B": Shape(24, 14, 2, 64),
    "Llama-3.2-1B": Shape(16, 32, 8, 64),
    "Llama-3.1-8B": Shape(32, 32, 8, 128),
}


class Step:
    """A slot of q, k and v and one of results in private memory, and attention from one to the other."""

    def __init__(self, shape: Shape, rows: int) -> None:
        entries, offset = [], SLOTS_OFFSET
        for width in ((shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.heads * shape.head_dim):
            entries.append((offset, rows, width, F32))
            offset += -(-rows * width * 4 // PAGE) * PAGE
        self._memory = mmap.mmap(-1, offset)
        self._slots = _native.SlotTable(self._memory, entries)
        self._shape = shape
        _, _, width, _ = entries[0]
        values = np.random.default_rng(0).standard_normal((rows, width), np.float32)
        _native.store_rows(self._slots, 0, 0, rows, values)

    def attend(self, cache: _native.KeyValueCache, segments: np.ndarray, window: int | None = None) -> None:
        scale = self._shape.head_dim**-0.5
        _native.attend(cache, self._slots, 0, 1, segments, num_heads=self._shape.heads, scale=scale, window=window)


def new_cache(shape: Shape, sequences: int, positions: int) -> _native.KeyValueCache:
    each = -(-positions // BLOCK)
    table = np.arange(sequences * each, dtype=np.int32).reshape(sequences, each)
    return _native.KeyValueCache(shape.kv_heads, shape.head_dim, table)


def filled_cache(shape: Shape, sequences: int, positions: int) -> _native.KeyValueCache:
    cache, rows = new_cache(shape, sequences, positions), min(positions, 1024)
    step = Step(shape, rows)
    for sequence in range(sequences):
        for position in range(0, positions, rows):
            count = min(rows, positions - position)
            step.attend(cache, np.array([[sequence, position, 0, count]], np.int32), window=1)
    return cache


def seconds(act: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    act()
    return time.perf_counter() - started_s


def fastest_tenth(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 10]


def decode(shape: Shape, sequences: int, context: int, rounds: int, other: Callable[[], object]) -> dict[str, Any]:
    cache = filled_cache(shape, sequences, context)
    step = Step(shape, sequences)
    layer_before = filled_cache(shape, sequences, context)
    segments = np.array([[sequence, context - 1, sequence, 1] for sequence in range(sequences)], np.int32)

    def read(of: _native.KeyValueCache = cache) -> None:
        for sequence in range(sequences):
            of.read(sequence, context)

    found: dict[str, list[float]] = {"attend": [], "read": []}
    for number in range(rounds):
        turns = [("attend", lambda: step.attend(cache, segments)), ("read", read)]
        for name, act in turns if number % 2 else reversed(turns):
            other()
            read(layer_before)
            step.attend(layer_before, segments)
            found[name].append(seconds(act))
    size_bytes = -(-context // BLOCK) * cache.block_bytes * sequences
    pairs = list(zip(found["read"], found["attend"], strict=True))
    return {
        "cache_bytes": size_bytes,
        "attend_us": statistics.median(found["attend"]) * 1e6,
        "read_us": statistics.median(found["read"]) * 1e6,
        "read_gb_per_s": size_bytes / statistics.median(found["read"]) / 1e9,
        "share_of_read": statistics.median(read_s / attend_s for read_s, attend_s in pairs),
        "fastest_share": fastest_tenth(found["read"]) / fastest_tenth(found["attend"]),
    }


def prefill(shape: Shape, tokens: int, rounds: int) -> dict[str, Any]:
    step = Step(shape, tokens)
    caches = [new_cache(shape, 1, tokens) for _ in range(shape.layers)]
    segment = np.array([[0, 0, 0, tokens]], np.int32)
    found = [[seconds(lambda cache=cache: step.attend(cache, segment)) for cache in caches] for _ in range(rounds)]
    least_s = sum(min(of_layer) for of_layer in zip(*found, strict=True))
    # Two products of D fused multiply-adds for each query head and each key that a row sees.
    flops = shape.layers * shape.heads * tokens * (tokens + 1) // 2 * shape.head_dim * 4
    return {
        "median_s": statistics.median(sum(layers) for layers in found),
        "least_s": least_s,
        "gflop_per_s": flops / least_s / 1e9,
    }


def print_decode(rows: list[dict[str, Any]]) -> None:
    cells = [
        [
            row["shape"],
            f"{row['sequences']} x {row['context']:,}",
            f"{row['cache_bytes'] / 1e6:.2f} MB",
            f"{row['attend_us']:.1f} us",
            f"{row['read_us']:.1f} us",
            f"{row['read_gb_per_s']:.1f} GB/s",
            f"{row['share_of_read']:.0%}",
            f"{row['fastest_share']:.0%}",
        ]
        for row in rows
    ]
    print()
    titles = ["decode", "context", "cache", "attention", "read", "speed", "share", "fastest"]
    print_columns(titles, cells, names=2)


def print_prefill(rows: list[dict[str, Any]]) -> None:
    cells = [
        [row["shape"], f"{row['median_s']:.3f} s", f"{row['least_s']:.3f} s", f"{row['gflop_per_s']:.0f}"]
        for row in rows
    ]
    print()
    print_columns([f"prefill of {rows[0]['tokens']:,}, all layers", "median", "least", "GFLOP/s"], cells)


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("--rounds", type=positive, default=60, metavar="N", help="of decode; a tenth of prefill (60)")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="of attention and of the read (2)")
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME", help=f"{', '.join(SHAPES)} (all)"
    )
    parser.add_argument("--json", metavar="FILE", help="what was found, as JSON too")
    arguments = parser.parse_args()
    _native.set_num_threads(arguments.threads, PATIENCE_US)
    report: dict[str, Any] = {"environment": environment(), "threads": arguments.threads, "decode": [], "prefill": []}
    report["instruction_set"] = _native.active_instruction_set()
    say_facts({**report["environment"], "threads": arguments.threads, "attention by": report["instruction_set"]})
    other, other_positions = Shape(1, 1, 1, 64), OTHER_BYTES // (2 * 64 * 2)
    other_cache = filled_cache(other, 1, other_positions)
    for name in arguments.shape:
        for sequences, context in ((1, 512), (1, 4096), (8, 512), (8, 4096)):
            found = decode(
                SHAPES[name], sequences, context, arguments.rounds, lambda: other_cache.read(0, other_positions)
            )
            report["decode"].append({"shape": name, "sequences": sequences, "context": context, **found})
    print_decode(report["decode"])
    for name in arguments.shape:
        found = prefill(SHAPES[name], 1024, max(1, arguments.rounds // 10))
        report["prefill"].append({"shape": name, "tokens": 1024, **found})
    print_prefill(report["prefill"])
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
