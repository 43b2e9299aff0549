"""What `tsqp-shm bench modes` prints: the modes side by side, what each protects, and where each pays elsewhere."""

from __future__ import annotations

from typing import Any, TextIO

from tsqp_shm.bench.report import duration, machine_line, or_dash
from tsqp_shm.bench.tables import print_columns, say
from tsqp_shm.modes import MODES

# Contenders that the others are read against.
_AGAINST = ("verified", "tee-only")
_CASES = {
    "prefill": "a prompt of {tokens:,} tokens, to its last row's logits",
    "decode": "a token of one sequence at context {tokens:,}",
    "batch": "a token of {sequences} sequences together, each at context {tokens:,}",
}
_LEGEND = """\
Of a token: MB over the border, both ways; CPU milliseconds of all processes of the session, its GPU process on a CPU
included; +pads, with what making its pads took before. pads/s: pads of one row of one Linear, made while the stock was
filled, or used. /verified, /tee-only: of the time."""
_FORECAST = """\
Where each mode pays: a forecast by tsqp_shm/bench/modes/forecast.py, not a measurement, and a bound from below for
times. Machines' figures are assumptions (published peaks); the cores' work a word is as measured here. Tokens/s,
context 512; of a prompt of 1,024 tokens seconds. Last, of
blinded and tee-only, which both hide activations, the one that takes less time, and how many times less: with a pad in
stock for every row, and without stock, when the TEE's cores make pads meanwhile."""


def print_tables(document: dict[str, Any], out: TextIO) -> None:
    settings, rows = document["settings"], document["rows"]
    say(machine_line(document["environment"]), out)
    devices = sorted({row["device"] for row in rows})
    say(
        f"{settings['model']}, device {', '.join(devices)}; {settings['threads']} threads of the GPU process and "
        f"{max(1, settings['threads'] // 2)} of the TEE process beside it, {settings['threads']} of tee-only; pads "
        f"made by {settings['pad_threads']} threads of idle priority; medians of {settings['runs']} runs in turns, who "
        "has no turn is stopped",
        out,
    )
    for case in dict.fromkeys(row["case"] for row in rows):
        _print_case([row for row in rows if row["case"] == case], out)
    say(_LEGEND, out)
    _print_modes(settings, rows, out)
    if document["outlook"] is None:
        print("", file=out)
        say("No forecast: it is made of what verified and tee-only have done, which were not both measured.", out)
        return
    _print_here(document["outlook"], out)
    _print_forecast(document["outlook"], out)


def _print_case(rows: list[dict[str, Any]], out: TextIO) -> None:
    title = _CASES[rows[0]["case"]].format(tokens=rows[0]["prompt_tokens"], sequences=rows[0]["sequences"])
    print("", file=out)
    say(title, out)
    medians = {row["label"]: row["median_s"] for row in rows}
    cells = []
    for row in rows:
        crossed = None
        if row["bytes_to_gpu"] is not None:
            per_token = row["prompt_tokens"] if row["per"] == "prefill" else 1
            crossed = (row["bytes_to_gpu"] + row["bytes_to_tee"]) / per_token / 1e6
        with_pads = row["cpu_s_per_token_with_pads"]
        cells.append(
            [
                row["label"],
                duration(row["median_s"]),
                f"{row['spread']:.0%}",
                _speed(row["tokens_per_s"]),
                *(or_dash(row["median_s"] / medians[name] if name in medians else None, ".2f") for name in _AGAINST),
                or_dash(crossed, ".3f"),
                f"{1e3 * row['cpu_s_per_token']:.2f}",
                or_dash(with_pads and 1e3 * with_pads, ".2f"),
                _thousands(row["pads_per_s"]),
            ]
        )
    against = [f"/{name}" for name in _AGAINST]
    print_columns(["", "median", "spread", "tokens/s", *against, "MB", "CPU", "+pads", "pads/s"], cells, out)


def _print_modes(settings: dict[str, Any], rows: list[dict[str, Any]], out: TextIO) -> None:
    print("", file=out)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        say(f"{mode}: {MODES[mode].summary}", out)
    stocked = [row for row in rows if row["label"] == "blinded stocked"]
    if stocked:
        meanwhile = ", ".join(f"{row['pads']['made']:,.0f} ({row['case']})" for row in stocked)
        say(
            f"blinded stocked: a stock of {settings['pad_stock']['stocked']:,} rows is full before each run, which "
            f"takes fewer, and no maker works when it begins; pads made again by its end: {meanwhile}",
            out,
        )
        say(
            f"blinded sustained: a stock of {settings['pad_stock']['sustained']:,} rows, as empty at the beginning as "
            "at the end; what has no pad waits for one",
            out,
        )


def _print_here(outlook: dict[str, Any], out: TextIO) -> None:
    costs, here = outlook["costs"], outlook["here"]
    print("", file=out)
    say(
        f"Measured here: int8 weights {here['memory_bytes_per_s'] / 1e9:.0f} GB/s on all cores; of one core "
        f"{costs['digit_macs_per_s'] / 1e9:,.0f} G/s of one int8 digit, {costs['pad_macs_per_s'] / 1e9:.1f} G/s of a "
        f"pad ({1e9 / costs['pad_macs_per_s']:.4f} ns each), checks {costs['check_ns']:.2f} ns a word "
        f"({costs['lone_check_ns']:.2f} where a row is alone), draws and masks {costs['pad_ns']:.2f} ns more, "
        f"attention {costs['attention_flops_per_s'] / 1e9:.0f} GFLOP/s; "
        f"GPU process {here['gpu_bytes_per_s'] / 1e9:.0f} GB/s and "
        f"{here['gpu_macs_per_s'] / 1e9:,.0f} G/s, round trip {here['round_trip_s'] * 1e6:.1f} us",
        out,
    )
    rows = outlook["beside_measured"]
    print("\nthe forecast for this machine, beside what was measured", file=out)
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [
            f"{row['label']} {duration(row['forecast_s'])} ({row['forecast_s'] / row['measured_s']:.2f})"
            for row in rows
            if row["case"] == case
        ]
        say(f"{case}: {'; '.join(cells)}", out, indent=2)


def _print_forecast(outlook: dict[str, Any], out: TextIO) -> None:
    print("", file=out)
    say(_FORECAST, out)
    for machine in outlook["machines"]:
        print("", file=out)
        say(f"{machine['name']}: {machine['in_words']}", out)
        cells = []
        for row in machine["rows"]:
            name = f"{row['rows']:,} sequences" if row["context"] else f"prompt of {row['rows']:,}"
            name = "1 sequence" if row["context"] and row["rows"] == 1 else name
            cells.append([row["model"], name, *(_cell(row, mode) for mode in row["seconds"]), winner(row["seconds"])])
        modes = ["tee-only", "verified", "stocked", "no stock"]
        print_columns(["", "", *modes, "with stock / without"], cells, out, names=2)


def winner(seconds: dict[str, float | None]) -> str:
    """Of the two that hide activations, with stock and without."""
    if seconds["stocked"] is None or seconds["sustained"] is None:
        return "tee-only; does not fit the GPU"
    alone = seconds["tee_only"]
    assert alone is not None
    return " / ".join(_faster(alone, seconds[name] or alone) for name in ("stocked", "sustained"))


def _faster(tee_only: float, blinded: float) -> str:
    return f"blinded {tee_only / blinded:.1f}x" if blinded <= tee_only else f"tee-only {blinded / tee_only:.1f}x"


def _cell(row: dict[str, Any], mode: str) -> str:
    seconds = row["seconds"][mode]
    if seconds is None:
        return "-"
    if not row["context"]:
        return f"{seconds:,.2f} s"
    return _speed(row["rows"] / seconds)


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.1f}" if tokens_per_s < 100 else f"{tokens_per_s:,.0f}"


def _thousands(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value < 1000 else f"{value / 1e3:,.1f}k"
