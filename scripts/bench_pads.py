#!/usr/bin/env python3
"""What pads cost: nanoseconds a word to draw, mask and take off, and how fast a maker makes the products of pads.

    scripts/bench_pads.py
    scripts/bench_pads.py --rounds 3 --rows 1 64 --shape 960x576 --json FILE

One thread. A word is one of m (draw, mask) or of y (unmask). `draw` is what a maker draws; `mask` draws too, and
writes m; `unmask` is what a check with pads takes more than one without, both in turns, with rW in a cache near by, and
in brackets with rW that comes from memory, as that of a large stock does. `together` is mask and unmask, of a Linear
with as many outputs as inputs; in brackets again from memory.

`direct` makes batches as the stock's threads do: draws, digits, products, rW put together. Its rate stands beside
that of the four-digit products alone, whose digits lie ready, of as many rows or of a whole run of them, whichever is
faster; in turns, on Linears of one shape that take turns too. Medians of the rounds. Needs no model.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from script_flags import ScriptParser, linear_shape, positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tsqp_shm.bench import _blinded_checks as blinded
from tsqp_shm.bench import _pads as pads
from tsqp_shm.bench.report import environment
from tsqp_shm.bench.tables import print_columns, say, say_facts

# Outputs x inputs: SmolLM2-135M's q|k|v, o, gate|up, down and lm_head.
SHAPES = ("960x576", "576x576", "3072x576", "576x1536", "49152x576")
ROWS = (1, 4, 64)
STOCK_BYTES = 128 << 20  # more than caches hold
WEIGHT_BYTES = 32 << 20
WORDS_A_ROUND = 1_000_000


def sizes_of(shape: str) -> tuple[int, int]:
    outputs, inputs = map(int, shape.split("x"))
    return outputs, inputs


def nanoseconds(work: Callable[[int], float], words: int, rounds: int) -> float:
    """A word, of `words` a time."""
    times = max(1, WORDS_A_ROUND // words)
    return statistics.median(work(times) for _ in range(rounds)) * 1e9 / times / words


def draws(kernels: str, width: int, rows: int, rounds: int) -> dict[str, float]:
    of_rows = pads.PadRows(kernels, width, rows)
    return {
        "draw": nanoseconds(of_rows.draw, width * rows, rounds),
        "mask": nanoseconds(of_rows.mask, width * rows, rounds),
    }


def unmask(outputs: int, inputs: int, rows: int, stock_rows: int, rounds: int) -> float:
    checks = blinded.BlindedChecks(outputs, inputs, rows, stock_rows)
    times = max(1, WORDS_A_ROUND // outputs // rows)
    more = [checks.finish(times, True) - checks.finish(times, False) for _ in range(rounds)]
    return statistics.median(more) * 1e9 / times / outputs / rows


def words(kernels: str, shape: str, rows: int, rounds: int) -> dict[str, float]:
    outputs, inputs = sizes_of(shape)
    found = draws(kernels, inputs, rows, rounds)
    found["unmask"] = unmask(outputs, inputs, rows, rows, rounds)
    found["unmask, from memory"] = unmask(outputs, inputs, rows, max(rows, STOCK_BYTES // 4 // outputs), rounds)
    for name in ("unmask", "unmask, from memory"):
        found[name.replace("unmask", "together")] = found["mask"] + found[name]
    return found


def direct(shape: str, rounds: int) -> dict[str, float]:
    """Thousand millions of products of field elements with weights a second."""
    outputs, inputs = sizes_of(shape)
    copies = max(2, WEIGHT_BYTES // (outputs * inputs))
    linears = blinded.DirectPads(outputs, inputs, copies)
    few, many = linears.made_rows, linears.product_rows
    made, of_few, of_many = [], [], []
    for _ in range(rounds):
        for linear in range(copies):
            made.append(linears.make(linear) / few)
            of_few.append(linears.multiply(linear, few) / few)
            of_many.append(linears.multiply(linear, many) / many)
    a_row = outputs * inputs / 1e9
    own = a_row / min(statistics.median(of_few), statistics.median(of_many))
    rate = a_row / statistics.median(made)
    return {"products": own, "direct": rate, "direct / products": rate / own}


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print()
    say(title)
    print_columns(
        ["", *columns], [[name, *(f"{found[column]:.3f}" for column in columns)] for name, found in rows.items()]
    )


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("--rounds", type=positive, default=15, metavar="N", help="of each time (15)")
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, metavar="N", help="a table each (1 4 64)")
    parser.add_argument(
        "--shape", nargs="+", type=linear_shape, default=SHAPES, metavar="OUTPUTSxINPUTS", help=f"({', '.join(SHAPES)})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, as JSON too")
    arguments = parser.parse_args()
    kernels = pads.kernel_names()[-1]
    facts: dict[str, Any] = {
        **environment(),
        "draws by": kernels,
        "products by": blinded.field_instruction_set(),
        "rounds": arguments.rounds,
    }
    say_facts(facts)
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for rows in arguments.rows:
        title = f"ns a word, {rows} rows" if rows > 1 else "ns a word, 1 row"
        tables[title] = {shape: words(kernels, shape, rows, arguments.rounds) for shape in arguments.shape}
        print_table(title, tables[title])
    for narrower in pads.kernel_names()[:-1]:
        title = f"ns a word, 4 rows, by {narrower}"
        inputs = {str(sizes_of(shape)[1]) for shape in arguments.shape}
        tables[title] = {
            width: draws(narrower, int(width), 4, max(1, arguments.rounds // 5)) for width in sorted(inputs)
        }
        print_table(title, tables[title])
    title = "thousand million products a second and thread"
    tables[title] = {shape: direct(shape, max(1, arguments.rounds // 5)) for shape in arguments.shape}
    print_table(title, tables[title])
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, **tables}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
