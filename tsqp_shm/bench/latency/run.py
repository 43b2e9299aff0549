"""`tsqp-shm bench latency`: every case in turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import random
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TextIO

import zmq

from tsqp_shm.arguments import require_writable
from tsqp_shm.bench.latency.cases import PAYLOADS, Case, make_cases
from tsqp_shm.bench.latency.copies import measured_copies
from tsqp_shm.bench.latency.peer import Peer
from tsqp_shm.bench.report import environment, machine_line, put_out
from tsqp_shm.bench.tables import print_columns, say
from tsqp_shm.config import EngineConfig, require_range
from tsqp_shm.errors import ArenaTooSmall
from tsqp_shm.progress import Progress

# Medians that are read against each other: (case, mode) over (case, mode).
RATIOS = (
    (("ring", "native"), ("ping-pong", "native")),
    (("doorbell", "adaptive"), ("doorbell", "zmq")),
    (("doorbell-parked", "adaptive"), ("doorbell", "zmq")),
)


@dataclass(frozen=True)
class LatencyOptions:
    """What was asked for.

    Attributes:
        runs: rounds; None: 20, or 2 where `quick`.
        limit_s: no round is begun that would end later.
        quick: small payloads and few round trips: does it work at all.
        max_bytes: largest payload; /dev/shm holds all of them once for each doorbell mode.
        json_file: a path, or "-" for stdout and no table there.
    """

    runs: int | None = None
    limit_s: float = 40.0
    quick: bool = False
    max_bytes: int = max(PAYLOADS)
    spin_us: int = EngineConfig.spin_us
    yield_us: int = EngineConfig.yield_us
    json_file: str | None = None


def run_latency(options: LatencyOptions) -> int:
    """Returns the exit code.

    Raises:
        ConfigError: an option is not allowed; before any work.
        ArenaTooSmall: /dev/shm has no room for the payloads.
    """
    runs = (2 if options.quick else 20) if options.runs is None else options.runs
    require_range("runs", runs, 1, 1_000_000)
    require_range("max-bytes", options.max_bytes, min(PAYLOADS), 1 << 40)
    for name in ("spin_us", "yield_us"):
        require_range(name.replace("_", "-"), getattr(options, name), 0, 10_000_000)
    require_writable("json", options.json_file)
    # Of before: what else the machine was doing. Waiters that yield suffer most from it.
    facts = environment()
    with ExitStack() as stack:
        try:
            peer, cases = make_cases(stack, options.quick, options.max_bytes, options.spin_us, options.yield_us)
        except ArenaTooSmall:
            print("the large payloads can be left out: --max-bytes 4194304", file=sys.stderr)
            raise
        # They hold views of the arenas, which have to go first.
        stack.callback(cases.clear)
        with Progress() as progress:
            rounds = _measure(peer, cases, runs, options.limit_s, progress)
        rows = [case.row() for case in cases]
    facts.update(libzmq=zmq.zmq_version(), spin_us=options.spin_us, yield_us=options.yield_us, rounds=rounds)
    document = {"environment": facts, "rows": rows, "ratios": _ratios(rows), "copies": measured_copies()}
    put_out(document, options.json_file, None, print_tables)
    return 0


def _measure(peer: Peer, cases: list[Case], runs: int, limit_s: float, progress: Progress) -> int:
    """Runs rounds until all are done or the time is up. Returns how many."""
    started = time.monotonic()
    shuffled = random.Random(0)
    for done in range(runs):
        elapsed_s = time.monotonic() - started
        if done and elapsed_s * (done + 1) / done > limit_s:
            print(f"stopped after {done} of {runs} rounds: --limit-s {limit_s:g}", file=sys.stderr)
            return done
        progress.show(f"round {done + 1}/{runs}")
        for case in shuffled.sample(cases, len(cases)):
            case.run(peer)
    return runs


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of medians."""
    medians = {(row["case"], row["mode"]): row["p50_us"] for row in rows if not row["payload_bytes"]}
    return {
        f"{' '.join(over)} / {' '.join(under)}": medians[over] / medians[under]
        for over, under in RATIOS
        if over in medians and under in medians
    }


def print_tables(document: dict[str, Any], out: TextIO) -> None:
    facts = document["environment"]
    waits = f"spin {facts['spin_us']} us, yield {facts['yield_us']} us"
    say(machine_line(facts, f"libzmq {facts['libzmq']}", waits, "round trips in us"), out)
    cells = []
    for row in document["rows"]:
        size = row["payload_bytes"]
        payload = "-" if not size else f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        form = ",.3f" if row["mode"] == "native" else ",.1f"
        numbers = [f"{row[name]:{form}}" for name in ("p50_us", "p90_us", "p99_us", "max_us")]
        cells.append([row["case"], row["mode"], payload, *numbers, f"{row['n']}"])
    print_columns(["case", "mode", "payload", "p50", "p90", "p99", "max", "n"], cells, out, names=3)
    for name, ratio in document["ratios"].items():
        say(f"{name}: {ratio:.3g} (medians)", out)
    _print_copies(document["copies"], out)


def _print_copies(copies: dict[str, Any], out: TextIO) -> None:
    if copies["reason"]:
        say(f"copies between arena and device: none measured, {copies['reason']}", out)
        return
    size = f"{copies['rows'][0]['bytes'] >> 20} MiB"
    cells = [
        [row["direction"], row["way"], f"{row['gb_per_s']:.1f}", f"{row['share_of_bus']:.0%}"] for row in copies["rows"]
    ]
    print_columns([f"copies of {size}", "way", "GB/s", "of the bus"], cells, out, names=2)
    for way, reason in copies["refused"].items():
        say(f"{way}: {reason}", out)
