"""Processes that are stopped, so that nothing they do by themselves takes anything from another's turn."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

# What was woken finds its caches cold and its clock low.
WAKING_S = 0.2
_PR_SET_PDEATHSIG = 1


def put_to_sleep(pid: int) -> None:
    """Stops a process, and then all that descend of it: they cannot start others meanwhile."""
    _signal([pid], signal.SIGSTOP)
    _signal(descendants(pid), signal.SIGSTOP)


def wake(pid: int, *, gently: bool = True) -> None:
    """Lets them go on; the process itself last, so that those whom it asks are awake.

    Args:
        gently: returns when they are as fast as they were.
    """
    _signal([*descendants(pid), pid], signal.SIGCONT)
    if gently:
        time.sleep(WAKING_S)


def wake_when_parent_dies() -> None:
    """Has the system wake this process where the one that stops it is killed: who sleeps does not see that."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """All that it has started, and what these have, as far as they still have it as a parent."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # Its name, in parentheses, may hold anything; of what follows the parent is the second.
            with suppress(OSError):
                children[int((entry / "stat").read_text().rpartition(")")[2].split()[1])].append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        found += (born := children[waiting.pop()])
        waiting += born
    return found


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
