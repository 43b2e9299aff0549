"""Processes that begin at once: forked from one that has imported what they need."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_SERVER = """
import importlib, json, os, signal, sys, traceback
signal.signal(signal.SIGINT, signal.SIG_IGN)
module = importlib.import_module(sys.argv[1])
running = set()
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        _, status = os.waitpid(order["wait"], 0)
        running.remove(order["wait"])
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            module.main(order["arguments"])
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    running.add(pid)
    print(pid, flush=True)
for pid in running:
    os.waitpid(pid, 0)
"""


class ForkServer:
    """Runs `MODULE.main(arguments)` in fresh processes; MODULE lies in this folder."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**_environment(), "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
        )

    def start(self, *arguments: str) -> int:
        """Returns the pid."""
        return self._ask({"arguments": arguments})

    def wait(self, pid: int) -> int:
        """The exit code of a process that was started; negative is a signal's number."""
        return self._ask({"wait": pid})

    def _ask(self, order: dict[str, object]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """Waits for all that still run."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _environment() -> dict[str, str]:
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": ":".join(filter(None, paths))}


def beside(act: Callable[[], object]) -> None:
    """Does `act` again and again in another process, until this one ends."""
    parent = os.getpid()
    if os.fork() == 0:
        with contextlib.suppress(BaseException):
            while os.getppid() == parent:
                act()
        os._exit(0)
