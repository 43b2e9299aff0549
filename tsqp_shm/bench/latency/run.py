"""`tsqp-shm bench latency`: every case in turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import json
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from tsqp_shm.arguments import STDOUT, require_writable
from tsqp_shm.bench.latency.cases import PAYLOADS, Case, make_cases
from tsqp_shm.bench.latency.copies import measured_copies
from tsqp_shm.bench.latency.peer import Peer
from tsqp_shm.bench.report import environment
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
    text = json.dumps(document, indent=2)
    if options.json_file == STDOUT:
        print(text)
        return 0
    _print_table(document)
    if options.json_file:
        Path(options.json_file).write_text(text + "\n")
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


def _print_table(document: dict[str, Any]) -> None:
    facts = document["environment"]
    virtual = ", virtual" if facts["virtual"] else ""
    print(
        f"{facts['cores']} cores of {facts['processor']}{virtual}; Python {facts['python']}, libzmq {facts['libzmq']}; "
        f"load {facts['load_1m']}; spin {facts['spin_us']} us, yield {facts['yield_us']} us; round trips in us"
    )
    print(f"{'case':<16}{'mode':<10}{'payload':>9}{'p50':>13}{'p90':>13}{'p99':>13}{'max':>13}{'n':>7}")
    for row in document["rows"]:
        size = row["payload_bytes"]
        payload = "-" if not size else f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        form = ",.3f" if row["mode"] == "native" else ",.1f"
        numbers = "".join(f"{row[name]:>13{form}}" for name in ("p50_us", "p90_us", "p99_us", "max_us"))
        print(f"{row['case']:<16}{row['mode']:<10}{payload:>9}{numbers}{row['n']:>7}")
    for name, ratio in document["ratios"].items():
        print(f"{name}: {ratio:.3g} (medians)")
    _print_copies(document["copies"])


def _print_copies(copies: dict[str, Any]) -> None:
    if copies["reason"]:
        print(f"copies between arena and device: none measured, {copies['reason']}")
        return
    size = f"{copies['rows'][0]['bytes'] >> 20} MiB"
    print(f"{'copies of ' + size:<18}{'way':<12}{'GB/s':>8}{'of the bus':>12}")
    for row in copies["rows"]:
        print(f"{row['direction']:<18}{row['way']:<12}{row['gb_per_s']:>8.1f}{row['share_of_bus']:>12.0%}")
    for way, reason in copies["refused"].items():
        print(f"{way}: {reason}")
