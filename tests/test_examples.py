"""The files of `examples/` run as they are, and say what is right."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
README = FOLDER.parent / "README.md"
# What each says, in the order of its lines, as expressions.
SAYS = {
    "complete.py": [
        r"'The capital of France is' -> ' Paris\.' \(ended by stop\)",
        r"'The opposite of hot is' -> ' cold\.' ",
        r"'1, 2, 3, 4,' -> ' 5, 6, 7",
    ],
    "chat.py": [
        r"> What is the capital of France\?",
        r"The capital of France is Paris\.",
        r"\[\d+ tokens read, 0 of them found in the cache\]",
        r"> What language do people speak there\?",
        r".*French",
        r"\[\d+ tokens read, [1-9]\d* of them found in the cache\]",
    ],
    "batch.py": [
        r"0: The capital of France is Paris\. \(log probability -\d+\.\d\d; waited \d+ ms, first token after \d+ ms\)",
        r"3: The capital of Germany is Berlin\.",
        r"7: The capital of Sweden is Stockholm\.",
        r"tsqp:request_success\{'finished_reason': 'stop'\} 8",
        r"tsqp:e2e_request_latency_seconds mean \d+\.\d+",
    ],
    "evidence.py": [
        r"answer: ' Paris\.', of the model sha256:[0-9a-f]{16}",
        r"the record is of this answer: True",
        r"computed again, it is the same: True",
    ],
    "callers.py": [r"'The capital of France is': ' Paris", r"'The capital of France is' -> ' Paris\.', ended by stop"],
}  # fmt: skip


@pytest.mark.slow
def test_the_examples_do_what_they_say(demo_model):
    # At once, as most of their time is Python's and torch's start.
    running = {
        name: subprocess.Popen(
            [sys.executable, FOLDER / name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in SAYS
    }
    try:
        for name, process in running.items():
            said, complaint = process.communicate()
            assert (process.returncode, complaint) == (0, ""), name
            lines = iter(said.splitlines())
            for expected in SAYS[name]:
                assert any(re.match(expected, line) for line in lines), (name, expected, said)
    finally:
        for process in running.values():
            if process.poll() is None:
                # As Ctrl-C: what it has of shared memory goes with it.
                process.send_signal(signal.SIGINT)
                process.wait()


def test_every_example_is_run_and_the_readme_names_it():
    files = {file.name for file in FOLDER.glob("*.py")}
    assert files == SAYS.keys()
    assert files <= set(re.findall(r"examples/(\w+\.py)", README.read_text()))
    assert all(15 <= len((FOLDER / name).read_text().splitlines()) <= 45 for name in files)
