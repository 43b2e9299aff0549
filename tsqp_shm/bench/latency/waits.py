"""`tsqp-shm bench waits`: what a doorbell costs for each pair of wait thresholds, and where the two sides run.

A scene says on which cores the two sides and, in one of them, a third program are, and how long the peer works on each
record. The cost is the round trip less that work. Every pair of thresholds has its link, and they take turns.
"""

from __future__ import annotations

import itertools
import os
import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tsqp_shm.arguments import require_writable
from tsqp_shm.bench.latency.cases import timed_trips
from tsqp_shm.bench.latency.links import Link, LinkSettings
from tsqp_shm.bench.latency.peer import Peer
from tsqp_shm.bench.plot import draw_waits, require_plot
from tsqp_shm.bench.report import environment, machine_line, put_out
from tsqp_shm.bench.tables import print_columns, say
from tsqp_shm.config import require_range
from tsqp_shm.errors import ConfigError
from tsqp_shm.progress import Progress

TRIPS = 25
MAX_PAIRS = 32


@dataclass(frozen=True)
class Scene:
    """Where the peer and a third program run, as places in the list of cores, and how long the peer works."""

    name: str
    peer_core: int
    busy_core: int | None = None
    work_us: int = 0


SCENES = (
    Scene("two cores", 1),
    Scene("two cores, the peer works 100 us", 1, work_us=100),
    Scene("one core", 0),
    Scene("one core, the peer works 100 us", 0, work_us=100),
    Scene("two cores, a third program on the peer's", 1, busy_core=1),
)


@dataclass(frozen=True)
class WaitsOptions:
    """What was asked for: a round of every scene and pair of thresholds, so many times."""

    runs: int = 5
    spin_us: tuple[int, ...] = (0, 2, 20, 200)
    yield_us: tuple[int, ...] = (0, 200, 2000)
    json_file: str | None = None
    plot_file: str | None = None


def run_waits(options: WaitsOptions) -> int:
    """Returns the exit code.

    Raises:
        ConfigError: an option is not allowed, or there is one core only; before any work.
    """
    pairs = list(itertools.product(options.spin_us, options.yield_us))
    require_range("runs", options.runs, 1, 1_000_000)
    for name, values in (("spin-us", options.spin_us), ("yield-us", options.yield_us)):
        for value in values:
            require_range(name, value, 0, 10_000_000)
    if len(pairs) > MAX_PAIRS:
        raise ConfigError("spin-us", len(pairs), f"at most {MAX_PAIRS} pairs of thresholds")
    require_writable("json", options.json_file)
    require_writable("plot", options.plot_file)
    if options.plot_file is not None:
        require_plot(Path(options.plot_file))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("cores", len(cores), "at least two, so that the sides can be apart")
    facts = environment()
    costs = _measure(pairs, options.runs, cores)
    rows = [_row(scene, pair, ns) for (scene, pair), ns in costs.items()]
    document = {"environment": facts, "rows": rows}
    put_out(document, options.json_file, options.plot_file, print_table, draw_waits)
    return 0


def _measure(
    pairs: list[tuple[int, int]], runs: int, cores: list[int]
) -> dict[tuple[Scene, tuple[int, int]], list[float]]:
    """Units: nanoseconds a round trip, the peer's work taken off."""
    costs: dict[tuple[Scene, tuple[int, int]], list[float]] = {key: [] for key in itertools.product(SCENES, pairs)}
    with ExitStack() as stack:
        links = {
            (spin, rest): Link(stack, f"{spin}-{rest}", LinkSettings("adaptive", spin, rest)) for spin, rest in pairs
        }
        peer = Peer({"links": {f"{spin}-{rest}": links[spin, rest].invitation for spin, rest in pairs}})
        stack.callback(peer.stop)
        third = Peer({})
        stack.callback(third.stop)
        for child in (peer, third):
            child.wait_done()
        for link in links.values():
            link.connect(peer)
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, cores[:1])
        shuffled = random.Random(0)
        progress = stack.enter_context(Progress())
        for number, scene in itertools.product(range(1, runs + 1), SCENES):
            progress.show(f"round {number}/{runs}, {scene.name}")
            peer.order(f"core {cores[scene.peer_core]}")
            if scene.busy_core is not None:
                third.order(f"core {cores[scene.busy_core]}")
                third.order("burn")
            for spin, rest in shuffled.sample(pairs, len(pairs)):
                peer.tell(f"link {spin}-{rest} {TRIPS + 1} {scene.work_us}")
                trips = timed_trips(TRIPS, links[spin, rest].ring)
                costs[scene, (spin, rest)] += [ns - 1000 * scene.work_us for ns in trips]
                peer.wait_done()
            if scene.busy_core is not None:
                third.order("rest")
    return costs


def _row(scene: Scene, pair: tuple[int, int], costs_ns: list[float]) -> dict[str, Any]:
    p50, p90, p99 = np.percentile(costs_ns, [50, 90, 99], method="inverted_cdf").tolist()
    return {
        "scene": scene.name,
        "spin_us": pair[0],
        "yield_us": pair[1],
        "p50_us": p50 / 1000,
        "p90_us": p90 / 1000,
        "p99_us": p99 / 1000,
        "n": len(costs_ns),
    }


def print_table(document: dict[str, Any], out: TextIO) -> None:
    say(machine_line(document["environment"], "what a round trip costs beside the peer's work, in us"), out)
    cells = [
        [
            row["scene"],
            f"{row['spin_us']}",
            f"{row['yield_us']}",
            *(f"{row[name]:,.1f}" for name in ("p50_us", "p90_us", "p99_us")),
            f"{row['n']}",
        ]
        for row in document["rows"]
    ]
    print_columns(["scene", "spin", "yield", "p50", "p90", "p99", "n"], cells, out, names=3)
