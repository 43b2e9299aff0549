#!/usr/bin/env python3
"""Measure what one hand-over between the two processes costs, beside what it would cost through ZeroMQ messages.

Two real processes over real arenas, opened as a session opens them. A round trip begins when the TEE side starts to
write the payload and ends when it has read the answer:

  doorbell         submit to completion and nothing else, in each doorbell mode
  doorbell-parked  the same, but the peer sleeps on its socket before each ring
  slot             the TEE writes every byte of a slot and rings; the peer reads every byte, writes each anew in place
                   and completes; the TEE reads every byte
  zmq-raw          the same work on private buffers, the payload sent both ways over ZeroMQ REQ/REP as raw bytes, with
                   no more copies than pyzmq needs
  zmq-msgpack      the same as float32 arrays in msgpack, {"shape", "dtype", "data"}, over ZeroMQ REQ/REP

The cases take turns in rounds, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import zmq

from tsqp_shm import __version__, _native
from tsqp_shm.config import DOORBELLS, EngineConfig
from tsqp_shm.errors import ArenaTooSmall, PeerDied, TsqpError
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.doorbell import Doorbell, open_doorbell
from tsqp_shm.shm.liveness import HEARTBEAT_INTERVAL_MS, PeerWatch
from tsqp_shm.shm.plan import Plan, Slot
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Record
from tsqp_shm.shm.session import Session
from tsqp_shm.shm.slots import Slots, open_slots
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue

Words = npt.NDArray[np.uint64]

# Payload in bytes, and round trips in a row within one round.
PAYLOADS = {8 << 10: 40, 64 << 10: 40, 512 << 10: 20, 4 << 20: 5, 64 << 20: 1}
DOORBELL_TRIPS = 100
PARKED_TRIPS = 10
QUICK_PAYLOADS = {8 << 10: 4, 64 << 10: 4}
QUICK_DOORBELL_TRIPS = 10
QUICK_PARKED_TRIPS = 2

# The peer answers each word xor this; the sum of the answer shows that every word was read and written.
ANSWER_MASK = 0x5A5A5A5A5A5A5A5A
TIMEOUT_S = 20.0
# Control.submission_parked of native/layout.h: odd while the peer sleeps, or is about to.
PARKED_OFFSET_BYTES = layout.CONTROL_OFFSET_BYTES + 2 * 128
# From the flag to the system call in which the peer sleeps.
FALL_ASLEEP_S = 0.001


@dataclass
class Case:
    """What is measured, and its round trips so far.

    Attributes:
        order: what the peer is told to serve, as the first words of a line.
        trip: makes one round trip; its argument is a number to write.
        before: waits until the next round trip may begin; not measured.
    """

    name: str
    mode: str
    payload_bytes: int
    trips: int
    order: str
    trip: Callable[[int], None]
    before: Callable[[], None] = lambda: None
    latencies_ns: list[int] = field(default_factory=list)

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


class Peer:
    """The other process: started afresh, told over its stdin what to serve next."""

    def __init__(self, invitation: dict[str, Any]) -> None:
        # Its writing end is held by this process alone, so the peer sees it close however this process ends.
        lifeline, self._lifeline = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--peer", str(lifeline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[lifeline],
            # Ctrl-C is for the process that measures; it then stops this one.
            start_new_session=True,
        )
        os.close(lifeline)
        self.tell(json.dumps(invitation))

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._raise_death()

    def wait_done(self) -> None:
        """Waits until the peer has served its order and waits, asleep, for the next."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "done\n":
            self._raise_death()

    def death(self) -> TsqpError | None:
        code = self._process.poll()
        return None if code is None else PeerDied("peer", f"exit code {code}")

    def _raise_death(self) -> NoReturn:
        raise PeerDied("peer", f"exit code {self._process.wait(TIMEOUT_S)}")

    def stop(self) -> None:
        os.close(self._lifeline)
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # What could not be told is not told.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Baseline:
    """One end of a REQ/REP pair and the private buffers that messages are made in."""

    def __init__(self, stack: ExitStack, endpoint: str, is_peer: bool, sizes: list[int]) -> None:
        context = stack.enter_context(zmq.Context())
        self._socket = stack.enter_context(context.socket(zmq.REP if is_peer else zmq.REQ))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        if is_peer:
            self._socket.connect(endpoint)
        else:
            self._socket.bind(endpoint)
        self._msgpack: Any = importlib.import_module("msgpack") if has_msgpack() else None
        self._buffers: dict[int, Words] = {size: np.zeros(size // 8, np.uint64) for size in sizes}

    def trip(self, form: str, size: int, value: int) -> None:
        buffer = self._buffers[size]
        buffer.fill(value)
        self._send(form, buffer)
        check_answer(self._receive(form), value)

    def serve_one(self, form: str, size: int) -> None:
        buffer = self._buffers[size]
        np.bitwise_xor(self._receive(form), ANSWER_MASK, out=buffer)
        self._send(form, buffer)

    def _send(self, form: str, words: Words) -> None:
        if form == "zmq-raw":
            # Not copied: the buffer is written again only after the answer, so after it was sent.
            self._socket.send(words.data, 0, copy=False)
            return
        floats = words.view(np.float32)
        packed = {"shape": list(floats.shape), "dtype": str(floats.dtype), "data": floats.tobytes()}
        self._socket.send(self._msgpack.packb(packed))

    def _receive(self, form: str) -> Words:
        if form == "zmq-raw":
            return np.frombuffer(self._socket.recv(copy=False).buffer, np.uint64)
        packed = self._msgpack.unpackb(self._socket.recv())
        floats = np.frombuffer(packed["data"], packed["dtype"]).reshape(packed["shape"])
        words: Words = floats.view(np.uint64)
        return words


def has_msgpack() -> bool:
    return importlib.util.find_spec("msgpack") is not None


def plan_of(sizes: list[int]) -> Plan:
    """One slot for each payload."""
    return Plan.of_slots({}, [(f"payload.{size}", "int32", 1, size // 4) for size in sizes])


def words_of(slots: Slots, slot: Slot) -> Words:
    words: Words = slots.view(slot).reshape(-1).view(np.uint64)
    return words


def check_answer(words: Words, value: int) -> None:
    """Reads every word."""
    expected = (value ^ ANSWER_MASK) * words.size % (1 << 64)
    if int(words.sum()) != expected:
        raise SystemExit("the peer's answer is wrong: a payload was not handed over whole")


def open_mode(
    stack: ExitStack, mode: str, sizes: list[int], arguments: argparse.Namespace
) -> tuple[Arena, Slots, Doorbell, dict[str, str]]:
    """One session, its arena and the TEE's end of its doorbell, and what the peer has to know of them."""
    session = stack.enter_context(Session.begin(f"bench-{mode}-{os.getpid()}"))
    arena = stack.enter_context(session.create_arena(plan_of(sizes), secrets.randbits(63) | 1))
    slots = stack.enter_context(open_slots(arena))
    stack.callback(_native.Heartbeat(arena.buffer, "tee", HEARTBEAT_INTERVAL_MS).release)
    endpoint = session.default_endpoint
    doorbell = open_doorbell(mode, arena, "tee", endpoint, arguments.spin_us, arguments.yield_us)
    stack.callback(doorbell.close)
    arena.publish()
    baseline = f"ipc://{session.folder / 'baseline'}"
    return arena, slots, doorbell, {"arena": arena.name, "endpoint": endpoint, "baseline": baseline}


def wait_until_parked(arena: Arena, peer: Peer) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while _native.load_word(arena.buffer, PARKED_OFFSET_BYTES) % 2 == 0:
        death = peer.death()
        if death is not None or time.monotonic() > deadline:
            raise death or SystemExit(f"the peer did not go to sleep within {TIMEOUT_S:.0f} s")
        time.sleep(0.0002)
    time.sleep(FALL_ASLEEP_S)


def make_cases(stack: ExitStack, arguments: argparse.Namespace) -> tuple[Peer, list[Case]]:
    """Brings both processes up."""
    payloads = QUICK_PAYLOADS if arguments.quick else PAYLOADS
    payloads = {size: trips for size, trips in payloads.items() if size <= arguments.max_bytes}
    sizes = list(payloads)
    opened = {mode: open_mode(stack, mode, sizes, arguments) for mode in DOORBELLS}
    invitations = {mode: parts[-1] for mode, parts in opened.items()}
    baseline_endpoint = invitations[DOORBELLS[0]]["baseline"]
    baseline = Baseline(stack, baseline_endpoint, False, sizes)
    peer = Peer(
        {
            "modes": invitations,
            "baseline": baseline_endpoint,
            "sizes": sizes,
            "spin_us": arguments.spin_us,
            "yield_us": arguments.yield_us,
        }
    )
    stack.callback(peer.stop)
    peer.wait_done()

    cases = []
    for mode, (arena, slots, doorbell, _) in opened.items():
        watch = PeerWatch(arena, "gpu", peer)
        queue = SubmissionQueue(slots, doorbell, watch, arena.epoch, TIMEOUT_S, Statistics())

        def ring(value: int, queue: SubmissionQueue = queue) -> None:
            queue.call(Opcode.STATUS)

        def hand_over(value: int, queue: SubmissionQueue, slot: Slot, words: Words) -> None:
            words.fill(value)
            queue.wait(queue.submit(Opcode.DOWN, in_slot=slot, out_slot=slot, rows=1))
            check_answer(words, value)

        trips = QUICK_DOORBELL_TRIPS if arguments.quick else DOORBELL_TRIPS
        cases.append(Case("doorbell", mode, 0, trips, mode, ring))
        if mode == "adaptive":
            trips = QUICK_PARKED_TRIPS if arguments.quick else PARKED_TRIPS

            def put_to_sleep(arena: Arena = arena) -> None:
                wait_until_parked(arena, peer)

            cases.append(Case("doorbell-parked", mode, 0, trips, mode, ring, put_to_sleep))
        for slot, (size, trips) in zip(arena.plan.slots, payloads.items(), strict=True):
            words = words_of(slots, slot)

            def trip(value: int, given: tuple[Any, ...] = (queue, slot, words)) -> None:
                hand_over(value, *given)

            cases.append(Case("slot", mode, size, trips, mode, trip))
    forms = ["zmq-raw"]
    if not has_msgpack():
        print("zmq-msgpack is left out: msgpack is not installed (pip install msgpack)", file=sys.stderr)
    else:
        forms.append("zmq-msgpack")
    for form in forms:
        for size, trips in payloads.items():

            def send(value: int, form: str = form, size: int = size) -> None:
                baseline.trip(form, size, value)

            cases.append(Case(form, "zmq", size, trips, f"{form} {size}", send))
    return peer, cases


def measure(peer: Peer, cases: list[Case], arguments: argparse.Namespace) -> int:
    """Runs rounds until all are done or the time is up. Returns how many."""
    started = time.monotonic()
    shuffled = random.Random(0)
    value = 0
    for done in range(arguments.runs):
        elapsed_s = time.monotonic() - started
        if done and elapsed_s * (done + 1) / done > arguments.limit_s:
            print(f"stopped after {done} of {arguments.runs} rounds: --limit-s {arguments.limit_s:g}", file=sys.stderr)
            return done
        if sys.stderr.isatty():
            print(f"\rround {done + 1}/{arguments.runs}", end="", file=sys.stderr, flush=True)
        for case in shuffled.sample(cases, len(cases)):
            # One more, not measured: it finds what the case before left of the caches.
            peer.tell(f"{case.order} {case.trips + 1}")
            for number in range(case.trips + 1):
                value += 1
                case.before()
                begin_ns = time.perf_counter_ns()
                case.trip(value)
                end_ns = time.perf_counter_ns()
                if number:
                    case.latencies_ns.append(end_ns - begin_ns)
            peer.wait_done()
    return int(arguments.runs)


def serve(lifeline: int) -> None:
    """Plays the peer: reads an invitation, then orders, until stdin or the other end of the lifeline closes."""

    def end_with_parent() -> None:
        os.read(lifeline, 1)
        # This side owns nothing that would stay behind.
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    line = sys.stdin.readline()
    if not line:
        return
    invitation = json.loads(line)
    sizes: list[int] = invitation["sizes"]
    with ExitStack() as stack:
        ends: dict[str, tuple[Doorbell, PeerWatch, list[Words]]] = {}
        for mode, names in invitation["modes"].items():
            arena = stack.enter_context(Arena.attach(names["arena"], plan_of(sizes)))
            slots = stack.enter_context(open_slots(arena))
            stack.callback(_native.Heartbeat(arena.buffer, "gpu", HEARTBEAT_INTERVAL_MS).release)
            doorbell = open_doorbell(
                mode, arena, "gpu", names["endpoint"], invitation["spin_us"], invitation["yield_us"]
            )
            stack.callback(doorbell.close)
            words = [words_of(slots, slot) for slot in arena.plan.slots]
            ends[mode] = doorbell, PeerWatch(arena, "tee"), words
        # Views of the arenas have to go before the arenas do.
        stack.callback(ends.clear)
        baseline = Baseline(stack, invitation["baseline"], True, sizes)
        print("done", flush=True)
        for line in sys.stdin:
            what, *numbers = line.split()
            if what in ends:
                serve_doorbell(*ends[what], int(numbers[0]))
            else:
                size, trips = map(int, numbers)
                for _ in range(trips):
                    baseline.serve_one(what, size)
            print("done", flush=True)


def serve_doorbell(doorbell: Doorbell, watch: PeerWatch, words: list[Words], trips: int) -> None:
    for _ in range(trips):
        record = Record.unpack(doorbell.receive(watch, TIMEOUT_S, "a submission"))
        if record.in_slot != NO_SLOT:
            payload = words[record.in_slot]
            np.bitwise_xor(payload, ANSWER_MASK, out=payload)
        doorbell.send(record._replace(busy_ns=0, value=0).pack())


def environment(arguments: argparse.Namespace, rounds: int, load_1m: float) -> dict[str, Any]:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "tsqp_shm": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processor": names[0] if names else "",
        "processors": len(os.sched_getaffinity(0)),
        "virtual": " hypervisor" in cpuinfo,
        "load_1m": round(load_1m, 2),
        "spin_us": arguments.spin_us,
        "yield_us": arguments.yield_us,
        "rounds": rounds,
    }


def print_table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    virtual = ", virtual" if facts["virtual"] else ""
    print(f"{facts['processors']} processors of {facts['processor'] or facts['machine']}{virtual}; "
          f"Python {facts['python']}, libzmq {facts['libzmq']}; "
          f"load {facts['load_1m']}; spin {facts['spin_us']} us, yield {facts['yield_us']} us; "
          "round trips in us")  # fmt: skip
    print(f"{'case':<16}{'mode':<10}{'payload':>9}{'p50':>13}{'p90':>13}{'p99':>13}{'max':>13}{'n':>7}")
    for row in rows:
        size = row["payload_bytes"]
        payload = "-" if not size else f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        numbers = "".join(f"{row[name]:>13,.1f}" for name in ("p50_us", "p90_us", "p99_us", "max_us"))
        print(f"{row['case']:<16}{row['mode']:<10}{payload:>9}{numbers}{row['n']:>7}")


def parse_arguments() -> argparse.Namespace:
    defaults = EngineConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE, or to stdout alone if it is -")
    parser.add_argument("--runs", type=int, metavar="N", help="rounds (20; with --quick 2)")
    parser.add_argument(
        "--limit-s", type=float, metavar="S", default=40.0, help="begin no round that would end later (40)"
    )
    parser.add_argument("--quick", action="store_true", help="small payloads and few round trips: does it work at all")
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", default=max(PAYLOADS),
        help=f"largest payload ({max(PAYLOADS)}); /dev/shm holds all of them {len(DOORBELLS)} times",
    )  # fmt: skip
    parser.add_argument(
        "--spin-us", type=int, metavar="N", default=defaults.spin_us, help=f"spin so long ({defaults.spin_us})"
    )
    parser.add_argument(
        "--yield-us", type=int, metavar="N", default=defaults.yield_us,
        help=f"then yield so long before sleeping ({defaults.yield_us})",
    )  # fmt: skip
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.runs is None:
        arguments.runs = 2 if arguments.quick else 20
    for name, lowest in (("runs", 1), ("max_bytes", min(PAYLOADS)), ("spin_us", 0), ("yield_us", 0)):
        if getattr(arguments, name) < lowest:
            parser.error(f"--{name.replace('_', '-')}: at least {lowest}")
    return arguments


def exit_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> int:
    arguments = parse_arguments()
    if arguments.peer is not None:
        serve(arguments.peer)
        return 0
    signal.signal(signal.SIGTERM, exit_by_signal)
    # Of before: what else the machine was doing. Waiters that yield suffer most from it.
    load_1m = os.getloadavg()[0]
    try:
        with ExitStack() as stack:
            peer, cases = make_cases(stack, arguments)
            rounds = measure(peer, cases, arguments)
            rows = [case.row() for case in cases]
            cases.clear()
    except ArenaTooSmall as error:
        print(f"{error}\nor leave the large payloads out: --max-bytes {4 << 20}", file=sys.stderr)
        return error.exit_code
    except TsqpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
    facts = environment(arguments, rounds, load_1m)
    document = json.dumps({"environment": facts, "rows": rows}, indent=2)
    if arguments.json == "-":
        print(document)
        return 0
    print_table(facts, rows)
    if arguments.json:
        Path(arguments.json).write_text(document + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
