"""The view of `tsqp-shm top` on a terminal: it fits, a key leaves it, and the terminal is as it was."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from models import RandomModel, model_folder
from pseudo_terminal import OnTerminal

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.shm.observer import Control, Observer
from tsqp_shm.shm.plan import Operation
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.protocol import Opcode, Record
from tsqp_shm.top.keys import Keys
from tsqp_shm.top.summary import Summary

LEFT_THE_SCREEN, CURSOR_SHOWN = b"\x1b[?1049l", b"\x1b[?25h"


@pytest.fixture
def llm(fast) -> Iterator[LLM]:
    with fast.llm(model_folder(RandomModel("llama")), max_model_len=256, max_num_seqs=2) as llm:
        llm.generate([3, 4, 5], SamplingParams(max_tokens=3, ignore_eos=True, temperature=0))
        yield llm


def top_until_it_shows(terminal: OnTerminal) -> list:
    """The terminal's modes while it is up."""
    terminal.read_until(lambda: b"q leaves" in terminal.seen and b"GPU" in terminal.seen)
    return terminal.modes()


@pytest.mark.parametrize(
    ("end", "code"),
    [(b"\x1b[Axq", 0), (b"\x03", 130), (signal.SIGTERM, 143)],
    ids=["q-behind-other-keys", "ctrl-c", "sigterm"],
)
def test_it_leaves_the_terminal_as_it_was(llm, end, code):
    with OnTerminal("top", "--interval", "0.1") as terminal:
        before = terminal.modes()
        meanwhile = top_until_it_shows(terminal)
        assert not meanwhile[3] & (termios.ICANON | termios.ECHO)
        assert meanwhile[3] & termios.ISIG
        if isinstance(end, bytes):
            terminal.type(end)
        else:
            terminal.signal(end)
        assert terminal.wait() == code
        assert terminal.modes() == before
        assert terminal.seen.rfind(LEFT_THE_SCREEN) > terminal.seen.rfind(b"GPU")
        assert CURSOR_SHOWN in terminal.seen


def test_no_key_is_read_where_standard_input_is_no_terminal(monkeypatch):
    read_end, write_end = os.pipe()
    os.write(write_end, b"q")
    with os.fdopen(read_end, "rb") as stdin, os.fdopen(write_end, "wb"), Keys() as before_any:
        assert not before_any.wait(0)
        monkeypatch.setattr(sys, "stdin", stdin)
        with Keys() as keys:
            assert not keys.wait(0.01)
        assert stdin.read(1) == b"q"


def test_every_line_fits_a_narrow_terminal(llm):
    columns = 40
    # This process's readline has told its environment of another terminal.
    without = ["env", "-u", "COLUMNS", "-u", "LINES"]
    with OnTerminal("top", "--once", "--interval", "0.1", columns=columns, under=without) as terminal:
        assert terminal.wait() == 0
    lines = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]|\r", b"", terminal.seen).decode().splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) < 24
    for word in ("session", "tokens/s", "TEE", "GPU", "heartbeat"):
        assert any(word in line for line in lines)


def test_what_a_side_was_at_lately_is_told_by_operation(llm):
    session = llm.bring_up()["session"]
    with closing(Observer(session, PosixTransport(session))) as observer:
        idle = observer.look()
        linears = observer.plan.linear_operations
        down, qkv = linears.index(Operation("DOWN", 1)), linears.index(Operation("QKV", 1))
        progress = idle.progress._replace(running=2, step_began_ns=2, step_ended_ns=1)
        asked = Record(8, 1, Opcode.LINEAR, down, 0, 0, 0, 4, 0, 0)
        done = asked._replace(sequence=7, target=qkv)
        quiet = Control._make([0] * 8)
        computing = replace(idle, progress=progress, in_flight=(), behind=done, control=quiet)
        asleep = quiet._replace(tee_parked=1, taken=8, completed=7, collected=7)
        waiting = replace(computing, in_flight=(asked,), control=asleep)
        summary = Summary(observer)
        for number, look in enumerate([computing, waiting, computing, computing]):
            summary.take(replace(look, at_ns=idle.at_ns + number))
        facts = summary.facts()
    assert facts["tee"]["doing"] == "computes after QKV, layer 1, 4 rows; 2 sequences in this step"
    assert facts["tee"]["lately"] == [
        {"doing": "computes after", "operation": "QKV", "share": 0.75},
        {"doing": "asleep, waits for", "operation": "DOWN", "share": 0.25},
    ]
    assert facts["gpu"]["lately"] == [
        {"doing": "waits", "operation": None, "share": 0.75},
        {"doing": "works on", "operation": "DOWN", "share": 0.25},
    ]
