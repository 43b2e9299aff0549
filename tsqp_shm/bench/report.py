"""What a run found: rows, the environment they were found in, and both as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import tsqp_shm
from tsqp_shm.arguments import STDOUT
from tsqp_shm.bench.cases import MODE_OF, Turn
from tsqp_shm.bench.tables import print_columns, say
from tsqp_shm.modes import MODES
from tsqp_shm.printable import print_json

Row = dict[str, Any]
# (contender, turn) -> the answers to its counted repetitions.
Answers = dict[tuple[str, Turn], list[dict[str, Any]]]
BORDER = ("bytes_to_gpu", "bytes_to_tee", "doorbells")


def make_rows(answers: Answers, flops: dict[int, int] | None = None) -> list[Row]:
    """One row for each contender and turn. Every number but the shares and the peaks is for one of `per`.

    Args:
        flops: of a prefill of so many tokens, where the growth from the shortest to the others is wanted.
    """
    rows = [_row(contender, turn, given) for (contender, turn), given in answers.items()]
    for row in rows:
        others = [other for other in rows if other is not row]
        same = [other for other in others if _turn(other) == _turn(row)]
        row["ratios"] = {other["contender"]: row["median_s"] / other["median_s"] for other in same}
        own = [other for other in others if other["contender"] == row["contender"]]
        alone = [other for other in own if other["sequences"] == 1 and other["prompt_tokens"] == row["prompt_tokens"]]
        row["speedup_over_one_sequence"] = alone[0]["median_s"] / row["median_s"] if alone else None
        shortest = min([row, *own], key=lambda other: int(other["prompt_tokens"]))
        row["growth"] = None
        if flops is not None and shortest is not row:
            tokens, before = row["prompt_tokens"], shortest["prompt_tokens"]
            row["growth"] = {
                "from_tokens": before,
                "time": row["median_s"] / shortest["median_s"],
                "arithmetic": flops[tokens] / flops[before],
            }
    return rows


def mode_of(contender: str) -> str | None:
    """Of this system's, by the name that may say settings too; None: another's."""
    return MODE_OF.get(contender.partition(" ")[0])


def _turn(row: Row) -> tuple[str, int, int]:
    return row["case"], row["sequences"], row["prompt_tokens"]


def _row(contender: str, turn: Turn, answers: list[dict[str, Any]]) -> Row:
    units = [answer["tokens"] if turn.new_tokens else 1 for answer in answers]
    samples = [answer["seconds"] / unit for answer, unit in zip(answers, units, strict=True)]
    median = statistics.median(samples)
    tokens_done, seconds = sum(answer["tokens"] for answer in answers), sum(answer["seconds"] for answer in answers)
    row: Row = {
        "case": turn.case,
        "contender": contender,
        "mode": mode_of(contender),
        "sequences": turn.sequences,
        "prompt_tokens": turn.tokens,
        "per": turn.per,
        "runs": len(samples),
        "median_s": median,
        "min_s": min(samples),
        "max_s": max(samples),
        "spread": (max(samples) - min(samples)) / median,
        "samples_s": samples,
        "tokens_per_s": (1 if turn.new_tokens else turn.tokens) / median,
        "cpu_s_per_token": sum(answer["cpu_s"] for answer in answers) / tokens_done,
        "peak_bytes": answers[-1]["peak_bytes"],
    }
    for name in BORDER:
        row[name] = sum(answer[name] for answer in answers) / sum(units) if name in answers[0] else None
    operations = _mean_operations(answers, sum(units))
    row["operations"] = operations
    for side in ("tee", "gpu"):
        busy_s = sum(operation["total_s"] for operation in operations if operation["side"] == side) * sum(units)
        row[f"{side}_busy_share"] = busy_s / seconds if any(each["side"] == side for each in operations) else None
    return row


def _mean_operations(answers: list[dict[str, Any]], units: int) -> list[dict[str, Any]]:
    totals: dict[tuple[str, str], list[float]] = {}
    for answer in answers:
        for operation in answer.get("operations", ()):
            total = totals.setdefault((operation["side"], operation["operation"]), [0, 0.0])
            total[0] += operation["calls"]
            total[1] += operation["total_s"]
    return [
        {"side": side, "operation": name, "calls": calls / units, "total_s": total_s / units}
        for (side, name), (calls, total_s) in totals.items()
    ]


def environment() -> dict[str, Any]:
    """The machine and the versions, and how busy the machine was before the run."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "virtual": " hypervisor" in cpuinfo,
        "load_1m": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "tsqp_shm": tsqp_shm.__version__,
        **{package: _version(package) for package in ("torch", "transformers", "numpy", "pyzmq")},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with "+changes" if it is not quite that."""
    root = Path(tsqp_shm.__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine_line(facts: dict[str, Any], *more: str) -> str:
    """Where a run was made, in a line."""
    virtual = ", virtual" if facts["virtual"] else ""
    versions = [f"{name} {facts[name]}" for name in ("torch", "transformers") if facts[name] is not None]
    return "; ".join(
        [
            f"{facts['cores']} cores of {facts['processor']}{virtual}",
            f"load {facts['load_1m']}",
            ", ".join([f"Python {facts['python']}", *versions]),
            f"commit {(facts['commit'] or '-')[:12]}",
            *more,
        ]
    )


def print_table(document: dict[str, Any], out: TextIO) -> None:
    settings, rows = document["settings"], document["rows"]
    say(machine_line(document["environment"]), out)
    lengths = ", ".join(f"{tokens:,}" for tokens in settings["tokens"])
    say(
        f"{settings['case']}, {lengths} tokens of prompt; {settings['model']}, {settings['dtype']}; "
        f"{settings['threads']} threads a process, half for the TEE process beside a GPU process; "
        f"{settings['runs']} runs in turns; "
        f"every number for one {rows[0]['per']}",
        out,
    )
    names = list(dict.fromkeys(row["contender"] for row in rows))
    # Of the settings of one contender the first is enough to read the others against.
    names = [name for name in names if name == names[0] or name.partition(" ")[0] != names[0].partition(" ")[0]]
    titles = ["contender", "seqs", "tokens", "median", "spread", "tokens/s", *(f"/{name}" for name in names)]
    titles += ["MB crossed", "doorbells", "TEE", "GPU", "CPU s/token", "peak MiB"]
    print("", file=out)
    print_columns(titles, [_cells(row, names) for row in rows], out, names=3)
    for name in dict.fromkeys(row["contender"] for row in rows):
        mode = mode_of(name)
        if mode is not None and MODES[mode].arithmetic is not None:
            say(f"{name} computes in {MODES[mode].arithmetic}", out)
    for row in rows:
        if row["speedup_over_one_sequence"] is not None:
            say(
                f"{row['contender']}: {row['sequences']} sequences give "
                f"{row['speedup_over_one_sequence']:.2f} times the tokens/s of one",
                out,
            )
        if row["growth"] is not None:
            growth = row["growth"]
            say(
                f"{row['contender']}: {row['prompt_tokens']:,} tokens take {growth['time']:.2f} times the time of "
                f"{growth['from_tokens']:,}, and {growth['arithmetic']:.2f} times the arithmetic",
                out,
            )


def _cells(row: Row, names: list[str]) -> list[str]:
    crossed = None if row["doorbells"] is None else (row["bytes_to_gpu"] + row["bytes_to_tee"]) / 1e6
    return [
        row["contender"],
        f"{row['sequences']}",
        f"{row['prompt_tokens']:,}",
        duration(row["median_s"]),
        f"{row['spread']:.1%}",
        f"{row['tokens_per_s']:,.1f}",
        *(or_dash(row["ratios"].get(name), ".3f") for name in names),
        or_dash(crossed, ",.2f"),
        or_dash(row["doorbells"], ",.0f" if row["per"] == "prefill" else ",.1f"),
        or_dash(row["tee_busy_share"], ".0%"),
        or_dash(row["gpu_busy_share"], ".0%"),
        f"{row['cpu_s_per_token']:.5f}",
        ", ".join(f"{role} {size / 2**20:,.0f}" for role, size in row["peak_bytes"].items()),
    ]


def duration(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def put_out(
    document: dict[str, Any],
    json_file: str | None,
    plot_file: str | None,
    print_tables: Callable[[dict[str, Any], TextIO], None],
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Prints a document as tables, or as JSON where that goes to stdout, and writes the files that are asked for."""
    if json_file == STDOUT:
        print_json(document, indent=2)
    else:
        print_tables(document, sys.stdout)
        if json_file:
            Path(json_file).write_text(json.dumps(document, indent=2) + "\n")
    if plot_file and draw is not None:
        draw(document, Path(plot_file))
