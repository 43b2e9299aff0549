"""A program that makes an LLM finds its process as it left it: what belongs to all of it is changed by none of ours."""

from __future__ import annotations

import gc
import json
import locale
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from models import RandomModel, model_folder

from tsqp_shm import SamplingParams

LIMITS = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
DENORMAL = 5e-324


def state() -> dict[str, object]:
    """What an embedding program may have set up, and rely on, in this process and thread."""
    # The thread's flags for denormals and rounding: a product that they would flush or round otherwise.
    arithmetic = (np.float64(DENORMAL) * np.float64(1.0), np.float32(1e-40) * np.float32(1.0), 1.0 + 2.0**-53)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "signals": {name: status[name].strip() for name in ("SigIgn", "SigCgt", "SigBlk")},
        "wakeup": signal.set_wakeup_fd(-1),
        "timer": signal.getitimer(signal.ITIMER_VIRTUAL),
        "umask": status["Umask"].strip(),
        "folder": Path.cwd(),
        "environment": dict(os.environ),
        "affinity": os.sched_getaffinity(0),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "limits": {name: resource.getrlimit(number) for name, number in LIMITS.items()},
        "out of memory": Path("/proc/self/oom_score_adj").read_text(),
        "name": Path("/proc/self/comm").read_text(),
        "session": (os.getsid(0), os.getpgrp()),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook, sys.breakpointhook),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "blocking": [os.get_blocking(descriptor) for descriptor in range(3)],
        "tracing": (sys.gettrace(), sys.getprofile(), threading.gettrace()),
        "interpreter": (sys.getrecursionlimit(), sys.getswitchinterval(), gc.get_threshold(), gc.isenabled()),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "locale": locale.setlocale(locale.LC_ALL),
        "random": (random.getstate(), np.random.get_state()[1].tolist()),
        "numpy": np.geterr(),
        "arithmetic": arithmetic,
    }


def test_an_llm_changes_nothing_that_belongs_to_the_whole_process(fast):
    before = state()
    with fast.llm(model_folder(RandomModel("llama")), max_model_len=64) as llm:
        llm.generate([[1, 2, 3], [4]], SamplingParams(max_tokens=4, temperature=1.0, seed=1))
        meanwhile = state()
    after = state()
    # The arena's guard is there as long as the arena is; it passes on what is not its own (tests/test_arena_guard.py).
    caught = int(before["signals"]["SigCgt"], 16) | 1 << signal.SIGBUS - 1
    assert int(meanwhile["signals"].pop("SigCgt"), 16) == caught
    at_first = {**before, "signals": {name: before["signals"][name] for name in ("SigIgn", "SigBlk")}}
    assert {name for name in meanwhile if meanwhile[name] != at_first[name]} == set()
    assert {name for name in after if after[name] != before[name]} == set()


# What a program does at its end, in which an LLM is still open: its own hooks run, with the handlers that it has set.
ENDS = """
import atexit, json, signal, sys
handlers = {number: (lambda number, frame: None) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
@atexit.register
def last():
    print(json.dumps([signal.getsignal(number) is handler for number, handler in handlers.items()]))
from tsqp_shm import LLM
for number, handler in handlers.items():
    signal.signal(number, handler)
sys.excepthook = lambda *_: print("hooked")
llm = LLM(sys.argv[1], device="cpu", gpu_threads=1, max_model_len=64)
raise ValueError
"""


@pytest.mark.slow
def test_a_program_s_own_hooks_and_handlers_last_to_its_end():
    command = [sys.executable, "-c", ENDS, str(model_folder(RandomModel("llama")))]
    said = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (said.returncode, said.stderr) == (1, "")
    hooked, kept = said.stdout.splitlines()
    assert hooked == "hooked"
    assert json.loads(kept) == [True, True, True]
