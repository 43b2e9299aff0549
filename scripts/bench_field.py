#!/usr/bin/env python3
"""What the integer products of `w8` reach: one row beside a plain read of the same bytes, many beside the instruction.

    scripts/bench_field.py
    scripts/bench_field.py --threads 1 --rounds 3 --shape 960x576 --json FILE

One row: each shape is there as often as leaves a cache nothing, and each round reads all copies, then multiplies them
with one row of one digit, of two, three and four. Many rows: multiplications a second and digit, as a share of those
of the instruction alone in registers, which each round measures too. `whole` is quantising, two digits and results
together. Of each copy its fastest round counts, as what else a machine does only slows it. Needs no model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from script_flags import ScriptParser, linear_shape, positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tsqp_shm.bench import _field_products as native
from tsqp_shm.bench.report import environment
from tsqp_shm.bench.tables import print_columns, say, say_facts

# Outputs x inputs: SmolLM2-135M's q|k|v, o, gate|up, down and lm_head, then Llama-3.2-1B's without its lm_head.
SHAPES = (
    "960x576",
    "576x576",
    "3072x576",
    "576x1536",
    "49152x576",
    "3072x2048",
    "2048x2048",
    "16384x2048",
    "2048x8192",
)
DIGITS = (1, 2, 3, 4)
ROWS = (256, 1024)
# Of the larger Linears many rows meet this many outputs: others are more of the same, and a run stays short.
MOST_OUTPUTS = 2048
PEAK_STEPS = 10_000  # some 15 us of each thread, 16 times


def copies_of(outputs: int, inputs: int, size_bytes: int) -> int:
    return max(2, -(-size_bytes // (outputs * inputs)))


class Fastest:
    """What each of several Linears, or each run of its rows, takes at best, together."""

    def __init__(self) -> None:
        self._seconds: np.ndarray | None = None

    def add(self, seconds: list[float]) -> None:
        self._seconds = np.array(seconds) if self._seconds is None else np.minimum(self._seconds, seconds)

    @property
    def seconds(self) -> float:
        assert self._seconds is not None
        return float(self._seconds.sum())


def one_row(outputs: int, inputs: int, rounds: int) -> dict[str, float]:
    """Shares of a plain read's speed, and that read in GB/s."""
    linears = native.FieldProducts(outputs, inputs, copies_of(outputs, inputs, 96 << 20))
    read = Fastest()
    products = {digits: Fastest() for digits in DIGITS}
    for _ in range(rounds):
        for digits, fastest in products.items():
            read.add(linears.read())
            fastest.add(linears.products(1, digits))
    shares = {f"{digits} digits": read.seconds / fastest.seconds for digits, fastest in products.items()}
    return {"read GB/s": linears.num_bytes / read.seconds / 1e9, **shares}


def many_rows(outputs: int, inputs: int, rounds: int) -> dict[str, float]:
    """Shares of the instruction's peak, and that peak in 10^9 multiplications a second."""
    outputs = min(outputs, MOST_OUTPUTS)
    copies = -(-(2 << 20) // (outputs * inputs))
    linears = native.FieldProducts(outputs, inputs, copies)
    peak = 0.0
    cases = [(rows, digits) for rows in ROWS for digits in DIGITS]
    products = {case: Fastest() for case in cases}
    whole = {rows: Fastest() for rows in ROWS}
    for _ in range(rounds):
        for (rows, digits), fastest in products.items():
            peak = max(peak, native.peak(PEAK_STEPS))
            fastest.add(linears.products(rows, digits))
        for rows, fastest in whole.items():
            fastest.add(linears.whole(rows))
    row = outputs * inputs * copies
    shares = {
        f"{rows} rows, {digits} digits": rows * digits * row / fastest.seconds / peak
        for (rows, digits), fastest in products.items()
    }
    shares |= {f"{rows} rows, whole": 2 * rows * row / fastest.seconds / peak for rows, fastest in whole.items()}
    return {"peak": peak / 1e9, **shares}


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    cells = [
        [name, *(f"{value:.0%}" if value < 2 else f"{value:.1f}" for value in found.values())]
        for name, found in rows.items()
    ]
    print()
    say(title)
    print_columns(["", *columns], cells)


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="of products and of the read (2)")
    parser.add_argument("--rounds", type=positive, default=9, metavar="N", help="of each product (9)")
    parser.add_argument(
        "--shape", nargs="+", type=linear_shape, default=SHAPES, metavar="OUTPUTSxINPUTS", help=f"({', '.join(SHAPES)})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, as JSON too")
    arguments = parser.parse_args()
    # An idle thread stays awake as long as it does between two kernels of a step.
    native.set_num_threads(arguments.threads, 200)
    facts: dict[str, Any] = {
        **environment(),
        "products by": native.instruction_set(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    say_facts(facts)
    shapes = {name: tuple(map(int, name.split("x"))) for name in arguments.shape}
    few = {name: one_row(*sizes, arguments.rounds) for name, sizes in shapes.items()}
    print_table("one row, outputs x inputs", few)
    many = {name: many_rows(*sizes, arguments.rounds) for name, sizes in shapes.items()}
    print_table("many rows, outputs x inputs", many)
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "one row": few, "many rows": many}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
