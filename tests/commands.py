"""The command, and what it says when it refuses."""

from __future__ import annotations

import subprocess
import sys


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tsqp_shm", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def assert_one_line(result: subprocess.CompletedProcess, exit_code: int, *said: str) -> None:
    """A command was refused: one clear line on stderr that says this, and nothing else."""
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tsqp-shm: ")
    for text in said:
        assert text in lines[0]
    assert result.returncode == exit_code
