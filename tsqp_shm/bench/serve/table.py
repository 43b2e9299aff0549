"""What a run found, as a table."""

from __future__ import annotations

from typing import Any, TextIO

from tsqp_shm.bench.report import machine_line, or_dash
from tsqp_shm.bench.serve.rows import Row, drawn
from tsqp_shm.bench.tables import print_columns, say

_TITLES = (
    "clients", "drawn", "server", "tokens/s", "spread", "of best", "first p50", "of best", "first p99", "next p50",
    "next p99", "next max", "failed", "CPU ms /token", "peak MiB",
)  # fmt: skip


def print_tables(document: dict[str, Any], out: TextIO) -> None:
    settings, rows = document["settings"], document["rows"]
    say(machine_line(document["environment"]), out)
    say(
        f"{settings['model']}, {settings['dtype']}; requests of {settings['tokens']:,} + {settings['new_tokens']:,} "
        f"tokens as streams of /v1/completions, {settings['requests']} of each client; {settings['threads']} threads, "
        f"half for a TEE process beside a GPU process; {settings['sequences']} sequences at once; "
        f"{settings['runs']} rounds in turns, whose turn it is not is stopped",
        out,
    )
    say(
        "medians of the rounds; first: ms from before the connection to the first text; next: ms from a piece of text "
        "to the next; of best: medians of the rounds' ratios",
        out,
    )
    print("", file=out)
    print_columns(_TITLES, [_cells(row) for row in rows], out, names=3)
    share = max(row["generator_share"] for row in rows)
    say(f"the generator took {share:.1%} of a core at most", out)
    for row in rows:
        server = f"{row['contender']}, {row['clients']} clients, {drawn(row['temperature'])}"
        for failure in row["failures"]:
            say(f"{server}: {failure}", out, indent=2)
        if row["tokens"] is not None and round(row["tokens"]) != settings["new_tokens"]:
            say(f"{server}: answers of {row['tokens']:.1f} tokens, as it counts them", out, indent=2)


def _cells(row: Row) -> list[str]:
    return [
        f"{row['clients']}",
        drawn(row["temperature"]),
        row["contender"],
        or_dash(row["tokens_per_s"], ",.1f"),
        or_dash(row["spread"], ".0%"),
        or_dash(row["over_best"], ".2f"),
        _ms(row["first_p50_s"]),
        or_dash(row["first_over_best"], ".2f"),
        *(_ms(row[name]) for name in ("first_p99_s", "gap_p50_s", "gap_p99_s", "gap_max_s")),
        f"{row['failed']}",
        _ms(row["cpu_s_per_token"]),
        f"{row['peak_bytes'] / 2**20:,.0f}",
    ]


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return format(1e3 * seconds, ",.0f" if seconds >= 0.1 else ".1f")
