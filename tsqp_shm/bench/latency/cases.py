"""The round trips that are measured, and the processes and links that they need.

ping-pong        native: one atomic word each way on cache lines of its own, both sides spinning; the least there is
ring             native: a record through each ring, waited for as the doorbell waits
doorbell         Python: submit to completion as the engine does it, and nothing else, in each doorbell mode
doorbell-parked  the same, but the peer sleeps on its socket before each ring
slot             the TEE writes every byte of a slot and rings; the peer reads every byte, writes each anew in place
                 and completes; the TEE reads every byte
zmq-raw          the same work on private buffers, the payload sent both ways over ZeroMQ REQ/REP as raw bytes, with
                 no more copies than pyzmq needs
zmq-msgpack      the same as float32 arrays in msgpack, {"shape", "dtype", "data"}, over ZeroMQ REQ/REP
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tsqp_shm.bench._round_trips import RoundTrips
from tsqp_shm.bench.latency.links import Link, LinkSettings
from tsqp_shm.bench.latency.messages import Messages
from tsqp_shm.bench.latency.payload import check_answer
from tsqp_shm.bench.latency.peer import Peer
from tsqp_shm.config import DOORBELLS
from tsqp_shm.shm.posix.folder import SOCKET_FILE

# Payload in bytes, and round trips in a row within one round.
PAYLOADS = {8 << 10: 40, 64 << 10: 40, 512 << 10: 20, 4 << 20: 5, 64 << 20: 1}
QUICK_PAYLOADS = {8 << 10: 4, 64 << 10: 4}
DOORBELL_TRIPS, QUICK_DOORBELL_TRIPS = 100, 10
PARKED_TRIPS, QUICK_PARKED_TRIPS = 10, 2
# A native round trip is as short as reading the clock, so a sample is the mean of several.
NATIVE_SAMPLES, QUICK_NATIVE_SAMPLES = 100, 10
NATIVE_TRIPS = 32


@dataclass
class Case:
    """What is measured, and its round trips so far.

    Attributes:
        order: what the peer is told to serve.
        measure: makes the round trips that the order is for. Units: nanoseconds, one entry for each that counts.
    """

    name: str
    mode: str
    payload_bytes: int
    order: str
    measure: Callable[[], list[float]]
    latencies_ns: list[float] = field(default_factory=list)

    def run(self, peer: Peer) -> None:
        peer.tell(self.order)
        self.latencies_ns += self.measure()
        peer.wait_done()

    def row(self) -> dict[str, Any]:
        p50, p90, p99, highest = np.percentile(self.latencies_ns, [50, 90, 99, 100], method="inverted_cdf").tolist()
        return {
            "case": self.name,
            "mode": self.mode,
            "payload_bytes": self.payload_bytes,
            "p50_us": p50 / 1000,
            "p90_us": p90 / 1000,
            "p99_us": p99 / 1000,
            "max_us": highest / 1000,
            "n": len(self.latencies_ns),
        }


def timed_trips(trips: int, trip: Callable[[], None], before: Callable[[], None] = lambda: None) -> list[float]:
    """Times each trip but one more, the first, which finds what the case before left of the caches.

    Args:
        before: waits until the next trip may begin; not timed.
    """
    latencies: list[float] = []
    for _ in range(trips + 1):
        before()
        begin_ns = time.perf_counter_ns()
        trip()
        latencies.append(time.perf_counter_ns() - begin_ns)
    return latencies[1:]


def make_cases(stack: ExitStack, quick: bool, max_bytes: int, spin_us: int, yield_us: int) -> tuple[Peer, list[Case]]:
    """Brings both processes up."""
    payloads = {size: n for size, n in (QUICK_PAYLOADS if quick else PAYLOADS).items() if size <= max_bytes}
    sizes = list(payloads)
    links = {mode: Link(stack, mode, LinkSettings(mode, spin_us, yield_us, sizes)) for mode in DOORBELLS}
    # Its rings carry the native round trips alone.
    links["native"] = Link(stack, "native", LinkSettings("spin", spin_us, yield_us))
    endpoint = links[DOORBELLS[0]].socket_path(f"{SOCKET_FILE}-messages")
    messages = Messages(stack, endpoint, False, sizes)
    peer = Peer(
        {
            "links": {name: link.invitation for name, link in links.items()},
            "native": "native",
            "spin_ns": 1000 * spin_us,
            "messages": endpoint,
            "sizes": sizes,
        }
    )
    stack.callback(peer.stop)
    peer.wait_done()
    for link in links.values():
        link.connect(peer)

    cases = _native_cases(stack, links.pop("native"), peer, QUICK_NATIVE_SAMPLES if quick else NATIVE_SAMPLES, spin_us)
    values = itertools.count(1)
    for mode, link in links.items():
        cases.append(_doorbell_case(mode, link, QUICK_DOORBELL_TRIPS if quick else DOORBELL_TRIPS))
        if mode == "adaptive":
            cases.append(_parked_case(mode, link, peer, QUICK_PARKED_TRIPS if quick else PARKED_TRIPS))
        cases += [_slot_case(mode, link, size, trips, values) for size, trips in payloads.items()]
    if "zmq-msgpack" not in messages.forms:
        print("zmq-msgpack is left out: msgpack is not installed (pip install msgpack)", file=sys.stderr)
    for form in messages.forms:
        cases += [_message_case(form, messages, size, trips, values) for size, trips in payloads.items()]
    return peer, cases


def _native_cases(stack: ExitStack, link: Link, peer: Peer, samples: int, spin_us: int) -> list[Case]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("ping-pong and ring are left out: two sides that spin need two cores", file=sys.stderr)
        return []
    held = [RoundTrips(link.arena.buffer, leads=True)]
    stack.callback(held.clear)

    def apart(measure: Callable[[], list[float]]) -> list[float]:
        # On one core they would measure its time slices.
        os.sched_setaffinity(0, {cores[0]})
        try:
            return measure()[1:]
        finally:
            os.sched_setaffinity(0, cores)

    def ping_pong() -> list[float]:
        return apart(lambda: held[0].ping_pong(samples + 1, NATIVE_TRIPS))

    def ring() -> list[float]:
        return apart(lambda: held[0].ring(samples + 1, NATIVE_TRIPS, 1000 * spin_us))

    numbers = f"{samples + 1} {NATIVE_TRIPS} {cores[1]}"
    return [
        Case("ping-pong", "native", 0, f"ping-pong {numbers}", ping_pong),
        Case("ring", "native", 0, f"ring {numbers}", ring),
    ]


def _doorbell_case(mode: str, link: Link, trips: int) -> Case:
    return Case("doorbell", mode, 0, f"link {mode} {trips + 1} 0", lambda: timed_trips(trips, link.ring))


def _parked_case(mode: str, link: Link, peer: Peer, trips: int) -> Case:
    def measure() -> list[float]:
        return timed_trips(trips, link.ring, lambda: link.wait_until_parked(peer))

    return Case("doorbell-parked", mode, 0, f"link {mode} {trips + 1} 0", measure)


def _slot_case(mode: str, link: Link, size: int, trips: int, values: itertools.count[int]) -> Case:
    words = link.payload(size)

    def trip() -> None:
        value = next(values)
        words.fill(value)
        link.hand_over(size)
        check_answer(words, value)

    return Case("slot", mode, size, f"link {mode} {trips + 1} 0", lambda: timed_trips(trips, trip))


def _message_case(form: str, messages: Messages, size: int, trips: int, values: itertools.count[int]) -> Case:
    def measure() -> list[float]:
        return timed_trips(trips, lambda: messages.trip(form, size, next(values)))

    return Case(form, "zmq", size, f"{form} {size} {trips + 1}", measure)
