"""Engines measured in turns: each is a process that loads its model once, and sleeps (SIGSTOP) but in its own turn.

What both sides of `bench_requests.py` and `bench_engines.py` have in common.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_MARK = "TURN "
# A contender that was woken finds its caches cold and its clock low.
_WAKING_S = 0.3


def play(answer: Callable[[Any], Any]) -> None:
    """A contender's own side: says that it is ready, then answers each order, until there are no more."""
    print(_MARK + "null", flush=True)
    for line in sys.stdin:
        print(_MARK + json.dumps(answer(json.loads(line))), flush=True)


class Contender:
    """A process of its own, asleep but in its turn.

    Args:
        python: its interpreter, of a venv that has what it imports.
        script: started with `--play`, its kind and the settings as JSON; it calls `play`.
    """

    def __init__(self, name: str, python: str, script: str, kind: str, settings: dict[str, Any]) -> None:
        self.name = name
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, script, "--play", kind, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def turn(self, order: Any) -> Any:
        """What it answers."""
        self._signal(signal.SIGCONT)
        time.sleep(_WAKING_S)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._has(int(entry.name)):
                with suppress(ProcessLookupError):
                    os.kill(int(entry.name), number)

    def _has(self, pid: int) -> bool:
        """Whether it is of its session, or descends of it."""
        try:
            if os.getsid(pid) == self._process.pid:
                return True
            while pid > 1 and pid != self._process.pid:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (ProcessLookupError, FileNotFoundError):
            return False
        return pid == self._process.pid

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line[len(_MARK) :])
        raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}; VERBOSE=1 shows what it said")


def print_rows(rows: dict[str, list[float]], unit: str, file: str | None) -> None:
    """A table of samples of each contender, taken in the same rounds, beside the first; also as JSON.

    The ratio is the median of the rounds' own ratios.
    """
    first = next(iter(rows.values()))
    document = []
    cells = []
    for name, samples in rows.items():
        median = statistics.median(samples)
        spread = (max(samples) - min(samples)) / median
        ratio = statistics.median(mine / other for mine, other in zip(samples, first, strict=True))
        cells.append([name, f"{median:.2f}", f"{spread:.0%}", f"{ratio:.3f}"])
        document.append({"name": name, "unit": unit, "samples": samples, "median": median, "ratio_to_first": ratio})
    # Not above: a contender's interpreter may have nothing of this package.
    from tsqp_shm.bench.tables import print_columns

    print_columns(["", unit, "spread", "ratio to the first"], cells)
    if file:
        Path(file).write_text(json.dumps(document, indent=2) + "\n")
