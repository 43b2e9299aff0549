"""The other process: started afresh as `python -m tsqp_shm.bench.latency.peer`, told over its stdin what to serve.

It reads an invitation, then orders, a line each, and says "done" after each: `link NAME TRIPS WORK_US`, `ping-pong
SAMPLES TRIPS CORE`, `ring SAMPLES TRIPS CORE`, `zmq-raw SIZE TRIPS`, `zmq-msgpack SIZE TRIPS`, `core N` (stay there),
`burn` (until the next line), `rest`. It ends when its stdin or the other end of its lifeline closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NoReturn

from tsqp_shm.bench._round_trips import RoundTrips
from tsqp_shm.bench.latency.links import TIMEOUT_S, PeerLink
from tsqp_shm.bench.latency.messages import Messages
from tsqp_shm.errors import PeerDied, TsqpError
from tsqp_shm.roles.inheritance import kept_apart
from tsqp_shm.roles.relay import Relay


class Peer:
    """This process's hold on the other one."""

    def __init__(self, invitation: dict[str, Any]) -> None:
        # Its writing end is held by this process alone, so the peer sees it close however this process ends.
        lifeline, self._lifeline = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tsqp_shm.bench.latency.peer", str(lifeline)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[lifeline],
            **kept_apart(stdin=subprocess.PIPE),
        )
        os.close(lifeline)
        assert self._process.stderr is not None
        self._relay = Relay("peer", self._process.stderr, lambda line: None)
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

    def order(self, line: str) -> None:
        """Tells it, and waits until it is done."""
        self.tell(line)
        self.wait_done()

    def death(self) -> TsqpError | None:
        code = self._process.poll()
        return None if code is None else self._death(code)

    def _death(self, code: int) -> PeerDied:
        self._relay.finish()
        return PeerDied("peer", f"exit code {code}", self._relay.last_words)

    def _raise_death(self) -> NoReturn:
        raise self._death(self._process.wait(TIMEOUT_S))

    def stop(self) -> None:
        os.close(self._lifeline)
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._relay.finish()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # What could not be told is not told.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def serve(lines: Iterable[str], lifeline: int) -> None:
    def end_with_parent() -> None:
        os.read(lifeline, 1)
        # This side owns nothing that would stay behind.
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    orders = iter(lines)
    invitation = json.loads(next(orders, "null"))
    if invitation is None:
        return
    with ExitStack() as stack:
        links: dict[str, PeerLink] = {}
        stack.callback(links.clear)
        for name, names in invitation.get("links", {}).items():
            links[name] = PeerLink(stack, names)
        messages = None
        if "messages" in invitation:
            messages = Messages(stack, invitation["messages"], True, invitation["sizes"])
        native: list[RoundTrips] = []
        if "native" in invitation:
            native.append(RoundTrips(links[invitation["native"]].arena.buffer, leads=False))
        stack.callback(native.clear)
        print("done", flush=True)
        for line in orders:
            match line.split():
                case ["link", name, trips, work_us]:
                    links[name].serve(int(trips), int(work_us))
                case ["ping-pong", samples, trips, core]:
                    with _on_core(core):
                        native[0].ping_pong(int(samples), int(trips))
                case ["ring", samples, trips, core]:
                    with _on_core(core):
                        native[0].ring(int(samples), int(trips), invitation["spin_ns"])
                case ["core", core]:
                    os.sched_setaffinity(0, {int(core)})
                case ["burn"]:
                    print("done", flush=True)
                    while not select.select([sys.stdin], [], [], 0)[0]:
                        pass
                    continue
                case [form, size, trips] if messages is not None and form in messages.forms:
                    for _ in range(int(trips)):
                        messages.serve_one(form, int(size))
                case ["rest"]:
                    pass
                case _:
                    raise SystemExit(f"no such order: {line}")
            print("done", flush=True)


@contextlib.contextmanager
def _on_core(core: str) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(core)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    serve(sys.stdin, int(sys.argv[1]))
