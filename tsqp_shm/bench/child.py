"""A contender's own side: load once, say so, then one timed repetition for each order.

A contender is started as `COMMAND JOB DESCRIPTOR`. On that descriptor, a socket, it says `{"ready": ...}` or
`{"failed": ...}`, then answers each order, a `Turn`, by one line. When the other end closes, it ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from tsqp_shm.bench.asleep import wake_when_parent_dies
from tsqp_shm.bench.cases import Job, Turn
from tsqp_shm.errors import TsqpError

Answer = dict[str, Any]


class Contender(Protocol):
    """A loaded model.

    Attributes:
        processes: the pids of all processes that work for it, by role.
        device: what it computes on, in words.
    """

    processes: dict[str, int]
    device: str

    def repeat(self, turn: Turn) -> Answer:
        """Runs once, and returns what `measured` gives, and more where it has more to tell."""


def serve(load: Callable[[Job, ExitStack], Contender]) -> int:
    """Plays a contender until the other end of its socket closes. Returns the exit code."""
    job = Job.from_json(sys.argv[1])
    connection = socket.socket(fileno=int(sys.argv[2]))
    # The processes that this one starts must not keep the other end waiting.
    connection.set_inheritable(False)
    signal.signal(signal.SIGTERM, _exit_by_signal)
    if job.sleeps:
        wake_when_parent_dies()
    orders: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    with ExitStack() as stack:
        try:
            contender = load(job, stack)
        except TsqpError as error:
            _say(connection, {"failed": str(error)})
            return 1
        _say(connection, {"ready": {"processes": contender.processes, "device": contender.device}})
        while True:
            # Asleep, so that it costs the others nothing.
            answer = contender.repeat(Turn(**orders.get()))
            peaks = {role: peak_resident_bytes(pid) for role, pid in contender.processes.items()}
            _say(connection, {**answer, "peak_bytes": peaks})


@contextmanager
def measured(processes: dict[str, int], answer: Answer) -> Iterator[None]:
    """Puts the time of the block, and the processor time that the processes spent meanwhile, into an answer.

    Units: seconds. Processor time comes in ticks of the kernel, 10 ms as a rule.
    """
    spent_before_s = sum(map(processor_seconds, processes.values()))
    started_ns = time.perf_counter_ns()
    yield
    answer["seconds"] = (time.perf_counter_ns() - started_ns) / 1e9
    answer["cpu_s"] = sum(map(processor_seconds, processes.values())) - spent_before_s


def processor_seconds(pid: int) -> float:
    """User and system time of a process, all of its threads and no other process."""
    # The name, in parentheses, may hold anything; what follows is numbers, utime and stime the 12th and 13th.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_resident_bytes(pid: int) -> int:
    """Peak resident memory of a process, shared pages that it has mapped included; 0 if it cannot be read."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _listen(connection: socket.socket, orders: queue.SimpleQueue[Answer]) -> None:
    # One that was killed before it had read what was said is a reset, and no end.
    with suppress(OSError), connection.makefile("r") as lines:
        for line in lines:
            orders.put(json.loads(line))
    # Nobody waits for an answer any more, however far a repetition is.
    os.kill(os.getpid(), signal.SIGTERM)


def _say(connection: socket.socket, answer: Answer) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


def _exit_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
