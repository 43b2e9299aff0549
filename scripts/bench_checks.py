#!/usr/bin/env python3
"""What the checks of products cost: nanoseconds a word, milliseconds of a token, and drawing what they need.

    scripts/bench_checks.py
    scripts/bench_checks.py --threads 1 --rounds 3 --shape 960x576 --json FILE

A word is one of m or y. What is timed is all that the TEE does for a product it does not make: rows to integers, m
written, y read, checked, and made floats; divided by the number of vectors it is the time of a word and vector. `check`
is the part of it that one vector more adds. Cold: before each call other data go through the caches, but for x, which
somebody has just written; fetched: the check was asked to `fetch` before. Linears of one shape take turns; of each the
median round counts, and beside it, in brackets, its fastest, as what else a machine does only slows it. Needs no model.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from script_flags import ScriptParser, linear_shape, positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tsqp_shm.bench import _field_checks as native
from tsqp_shm.bench.report import environment
from tsqp_shm.bench.tables import print_columns, say, say_facts

# Outputs x inputs: SmolLM2-135M's q|k|v, o, gate|up and down, then Llama-3.1-8B's.
SHAPES = ("960x576", "576x576", "3072x576", "576x1536", "6144x4096", "4096x4096", "28672x4096", "4096x14336")
ROWS = (1, 2, 4, 8, 64, 256)
# A token of SmolLM2-135M: so many Linears of a shape.
TOKEN = {"960x576": 30, "576x576": 30, "3072x576": 30, "576x1536": 30, "49152x576": 1}
# Of one shape so many Linears take turns, with so many bytes of other data before each call: the first one's vectors
# are in no cache when its turn comes.
LINEARS, BYTES_BETWEEN = 30, 2 << 20
CHECK_ROWS = 8
MANY_WORDS = 1 << 17  # of one call; fewer take so little time that more rounds cost nothing


def sizes_of(shape: str) -> tuple[int, int]:
    outputs, inputs = map(int, shape.split("x"))
    return outputs, inputs


class Times(NamedTuple):
    """Seconds of one call, or what was made of them: by medians, and by the fastest rounds."""

    median: float
    fastest: float

    def times(self, factor: float) -> Times:
        return Times(self.median * factor, self.fastest * factor)

    def less(self, other: Times) -> Times:
        return Times(self.median - other.median, self.fastest - other.fastest)


def taken(checks: Any, rounds: int, fetched: bool = False) -> Times:
    """Of begin and finish of one Linear together."""
    # [rounds, Linears]
    seconds = np.array([np.add(*checks.seconds(fetched)) for _ in range(rounds)])
    return Times(float(np.median(seconds, axis=0).mean()), float(seconds.min(axis=0).mean()))


def by_rows(shape: str, vectors: int, rounds: int, is_cold: bool) -> dict[str, Times]:
    """Nanoseconds a word and vector."""
    outputs, inputs = sizes_of(shape)

    def nanoseconds(rows: int, num_vectors: int) -> Times:
        copies, between = (LINEARS, BYTES_BETWEEN) if is_cold else (1, 0)
        checks = native.FieldChecks(outputs, inputs, num_vectors, rows, copies, between)
        of_rounds = rounds if is_cold or rows * (outputs + inputs) > MANY_WORDS else 30 * rounds
        return taken(checks, of_rounds).times(1e9 / rows / (outputs + inputs))

    found = {f"{rows} rows" if rows > 1 else "1 row": nanoseconds(rows, vectors).times(1 / vectors) for rows in ROWS}
    if not is_cold:
        more = nanoseconds(CHECK_ROWS, 2 * vectors)
        less = nanoseconds(CHECK_ROWS, vectors)
        found[f"check, {CHECK_ROWS} rows"] = more.less(less).times(1 / vectors)
    return found


def token(vectors: int, rounds: int) -> dict[str, dict[str, Times]]:
    """Milliseconds, by shape and in all."""
    found: dict[str, dict[str, Times]] = {}
    for shape, times in TOKEN.items():
        cold = native.FieldChecks(*sizes_of(shape), vectors, 1, LINEARS, BYTES_BETWEEN)
        warm = native.FieldChecks(*sizes_of(shape), vectors, 1, 1)
        more = native.FieldChecks(*sizes_of(shape), 2 * vectors, 1, LINEARS, BYTES_BETWEEN)
        found[f"{times} of {shape}"] = {
            "cold": taken(cold, rounds).times(1e3 * times),
            "so many vectors more, cold": taken(more, rounds).less(taken(cold, rounds)).times(1e3 * times),
            "fetched": taken(cold, rounds, fetched=True).times(1e3 * times),
            "warm": taken(warm, 100 * rounds).times(1e3 * times),
        }
    found["all"] = {
        kind: Times(*np.sum([row[kind] for row in found.values()], axis=0).tolist())
        for kind in found[f"30 of {SHAPES[0]}"]
    }
    return found


def draw(shape: str, vectors: int, rounds: int) -> dict[str, Times]:
    """Nanoseconds a weight that Ws of all vectors takes."""
    outputs, inputs = sizes_of(shape)
    checks = native.FieldChecks(outputs, inputs, vectors, 1, 1)
    seconds = [checks.draw() for _ in range(rounds)]
    return {"ns a weight": Times(statistics.median(seconds), min(seconds)).times(1e9 / outputs / inputs)}


def print_table(title: str, rows: dict[str, dict[str, Times]]) -> None:
    columns = list(next(iter(rows.values())))
    cells = [
        [name, *(f"{cell.median:.3f} ({cell.fastest:.3f})" for cell in found.values())] for name, found in rows.items()
    ]
    print()
    say(title)
    print_columns(["", *columns], cells)


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2], metavar="N", help="a table each (1 2)")
    parser.add_argument("--rounds", type=positive, default=9, metavar="N", help="of each time (9)")
    parser.add_argument("--vectors", type=positive, default=2, metavar="V", help="of each Linear (2)")
    parser.add_argument(
        "--shape", nargs="+", type=linear_shape, default=SHAPES, metavar="OUTPUTSxINPUTS", help=f"({', '.join(SHAPES)})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, as JSON too")
    arguments = parser.parse_args()
    vectors, rounds = arguments.vectors, arguments.rounds
    facts: dict[str, Any] = {
        **environment(),
        "checks by": native.instruction_set(),
        "vectors": vectors,
        "rounds": rounds,
    }
    say_facts(facts)
    tables: dict[str, dict[str, dict[str, Times]]] = {}
    for threads in arguments.threads:
        # An idle thread stays awake as long as it does between two kernels of a step.
        native.set_num_threads(threads, 200)
        on = f"{threads} threads" if threads > 1 else "1 thread"
        for kind in ("warm", "cold"):
            title = f"{kind}, {on}: ns a word and vector, outputs x inputs"
            tables[title] = {
                shape: by_rows(shape, vectors, rounds, is_cold=kind == "cold") for shape in arguments.shape
            }
            print_table(title, tables[title])
        title = f"a token of SmolLM2-135M, {on}"
        tables[title] = token(vectors, rounds)
        print_table(title, tables[title])
        title = f"drawing, {on}"
        tables[title] = {shape: draw(shape, vectors, rounds) for shape in arguments.shape}
        print_table(title, tables[title])
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, **tables}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
