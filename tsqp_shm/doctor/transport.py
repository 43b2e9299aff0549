"""The doorbell as a session would open it, tried with a second process: what carries a record here, and how fast."""

from __future__ import annotations

import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.finding import BAD, GOOD, WARNING, Finding
from tsqp_shm.doctor.peer import TRIAL_PLAN, TRIAL_TIMEOUT_S
from tsqp_shm.errors import PeerDied, TsqpError
from tsqp_shm.roles.inheritance import kept_apart
from tsqp_shm.roles.resources import NEEDED_DESCRIPTORS, NEEDED_THREADS, require_descriptors, require_threads
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.doorbell import Doorbell, open_doorbell
from tsqp_shm.shm.liveness import HEARTBEAT_INTERVAL_MS, LOOK_INTERVAL_S, PeerWatch
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.stream import require_usable

CHECK = "doorbell"
WARM_UP_TRIPS = 20
TRIPS = 200
SLEEPY_TRIPS = 10
# After this long without a record the peer is in its socket, whatever the thresholds of the wait.
FALL_ASLEEP_S = 2 * LOOK_INTERVAL_S
# Measured on idle machines of two cores, virtual ones included, with a margin of about five: docs/performance.md.
EXPECTED_US = {"arena": 50.0, "arena, one core": 1000.0, "ipc": 1000.0, "tcp": 1500.0}
# A sleeper looks at the ring by itself this often: a wake-up that takes so long has not come through.
LOST_WAKE_UP_US = LOOK_INTERVAL_S * 1e6 / 2


@dataclass(frozen=True)
class Trial:
    """Round trips of one doorbell. Units: microseconds.

    Attributes:
        waits: how this side's waits ended, as `Doorbell.waits`.
        asleep_us: median where the peer slept before each; None where it never sleeps.
    """

    p50_us: float
    p99_us: float
    waits: dict[str, int]
    asleep_us: float | None


class EchoPeer:
    """The other process of a trial; it answers each record with itself."""

    def __init__(self, stack: ExitStack, invitation: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tsqp_shm.doctor.peer", json.dumps(invitation)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # Nothing is written to it: its end tells the peer to go, however this process ends.
            **kept_apart(stdin=subprocess.PIPE),
        )
        stack.callback(self._stop)

    def death(self) -> TsqpError | None:
        code = self._process.poll()
        if code is None:
            return None
        _, errors = self._process.communicate()
        return PeerDied("trial", f"exit code {code}", errors.strip()[-500:])

    def _stop(self) -> None:
        try:
            self._process.communicate(timeout=TRIAL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def examine_transport(config: EngineConfig) -> Iterator[Finding]:
    """The doorbell that the settings choose, then each socket by itself, as a yardstick."""
    try:
        # libzmq would abort this process.
        require_descriptors(NEEDED_DESCRIPTORS)
        require_threads(NEEDED_THREADS)
        chosen = run_trial(config.doorbell, config.endpoint, config)
    except TsqpError as error:
        yield Finding(CHECK, BAD, f"{config.doorbell}: {error}", "no session comes up like this", _cure_of(config))
        return
    ipc, tcp = _yardstick("ipc", config), _yardstick("tcp", config)
    yield _judge(config, chosen, ipc)
    if chosen.asleep_us is not None:
        yield _judge_wake_up(config, chosen.asleep_us)
    for name, trial in (("ipc", ipc), ("tcp", tcp)):
        yield _judge_socket(name, trial)


def run_trial(mode: str, endpoint: str | None, config: EngineConfig) -> Trial:
    """Brings a session up with a peer that answers at once, and rings it.

    Raises:
        TsqpError: it does not come up, or the peer does not answer in time.
    """
    with ExitStack() as stack:
        # Dead sessions are left as they are: they are what somebody wants to look at.
        session = stack.enter_context(Session.begin(endpoint=endpoint, sweeps=False))
        memory = session.create_memory(TRIAL_PLAN.total_bytes)
        arena = stack.enter_context(Arena.create(memory, TRIAL_PLAN, secrets.randbits(63) | 1))
        stack.callback(_native.Heartbeat(arena.buffer, "tee", HEARTBEAT_INTERVAL_MS).release)
        # The other process binds it, and would say so in words that are not read here.
        require_usable(session.endpoint, "gpu")
        doorbell = open_doorbell(mode, arena, "tee", session.open_waker, config.spin_us, config.yield_us)
        stack.callback(doorbell.close)
        arena.publish()
        peer = EchoPeer(
            stack,
            {
                "mode": mode,
                "session": session.name,
                "endpoint": session.endpoint,
                "spin_us": config.spin_us,
                "yield_us": config.yield_us,
            },
        )
        return _ring(mode, doorbell, PeerWatch(arena, "gpu", peer))


def _ring(mode: str, doorbell: Doorbell, watch: PeerWatch) -> Trial:
    def trip(number: int) -> float:
        record = number.to_bytes(layout.RECORD_BYTES, "little")
        begin_ns = time.perf_counter_ns()
        doorbell.send(record)
        if doorbell.receive(watch, TRIAL_TIMEOUT_S, "the trial's answer") != record:
            raise TsqpError("the answer differs from what was sent")
        return (time.perf_counter_ns() - begin_ns) / 1000

    for number in range(1, WARM_UP_TRIPS + 1):
        trip(number)
    before = doorbell.waits
    awake = sorted(trip(number) for number in range(1, TRIPS + 1))
    waits = dict(doorbell.waits - before)
    asleep_us = None
    if mode == "adaptive":
        asleep = []
        for number in range(1, SLEEPY_TRIPS + 1):
            time.sleep(FALL_ASLEEP_S)
            asleep.append(trip(number))
        asleep_us = statistics.median(asleep)
    return Trial(awake[TRIPS // 2], awake[TRIPS * 99 // 100], waits, asleep_us)


def _yardstick(kind: str, config: EngineConfig) -> Trial | TsqpError:
    endpoint = None if kind == "ipc" else f"tcp://127.0.0.1:{_free_port()}"
    try:
        return run_trial("zmq", endpoint, config)
    except TsqpError as error:
        return error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _judge(config: EngineConfig, chosen: Trial, ipc: Trial | TsqpError) -> Finding:
    ways = ", ".join(f"{count} {how}" for how, count in sorted(chosen.waits.items()))
    carrier = "ZeroMQ messages" if config.doorbell == "zmq" else "the ring in the arena"
    found = f"{config.doorbell}, through {carrier}: {chosen.p50_us:,.1f} us p50, {chosen.p99_us:,.1f} us p99 ({ways})"
    if config.doorbell == "zmq":
        why = "each record goes through a socket and wakes a sleeper; README.md has both in one table"
        return Finding(CHECK, WARNING, found, why, "leave out --doorbell zmq")
    cores = len(os.sched_getaffinity(0))
    expected_us = EXPECTED_US["arena" if cores > 1 else "arena, one core"]
    if chosen.p50_us <= expected_us:
        return Finding(CHECK, GOOD, f"{found}; expected on {cores} core(s): at most {expected_us:,.0f} us")
    beside = f", a ZeroMQ message {ipc.p50_us:,.0f} us" if isinstance(ipc, Trial) else ""
    return Finding(
        CHECK, WARNING, found,
        f"expected on {cores} core(s): at most {expected_us:,.0f} us{beside}; the load is {os.getloadavg()[0]:.1f}",
        "give the two processes cores of their own, or end what else runs",
    )  # fmt: skip


def _judge_wake_up(config: EngineConfig, asleep_us: float) -> Finding:
    way = "tcp" if (config.endpoint or "").startswith("tcp://") else "ipc"
    found = f"a sleeping peer answers after {asleep_us:,.0f} us (p50, {way})"
    if asleep_us > LOST_WAKE_UP_US:
        why = "wake-ups do not come through the socket: a sleeper finds a record only when it looks by itself"
        return Finding("wake-up", BAD, found, why, "another --endpoint, or --doorbell spin")
    expected_us = EXPECTED_US[way]
    if asleep_us > expected_us:
        why = f"expected: at most {expected_us:,.0f} us; the load is {os.getloadavg()[0]:.1f}"
        return Finding("wake-up", WARNING, found, why, "end what else runs, or keep the processor from deep sleep")
    return Finding("wake-up", GOOD, found)


def _judge_socket(name: str, trial: Trial | TsqpError) -> Finding:
    check = f"{name} socket"
    if isinstance(trial, TsqpError):
        other = "tcp://127.0.0.1:PORT" if name == "ipc" else "ipc://PATH"
        return Finding(check, WARNING, str(trial), f"an {name}:// endpoint cannot be used", f"--endpoint {other}")
    found = f"{trial.p50_us:,.0f} us p50, {trial.p99_us:,.0f} us p99, a message for each record"
    return Finding(check, GOOD, found)


def _cure_of(config: EngineConfig) -> str:
    return "another --endpoint, or leave it out" if config.endpoint else "see the findings above"
