"""What a command says when it refuses."""

from __future__ import annotations

import subprocess


def assert_one_line(result: subprocess.CompletedProcess, exit_code: int, *said: str) -> None:
    """A command was refused: one clear line on stderr that says this, and nothing else."""
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tsqp-shm: ")
    for text in said:
        assert text in lines[0]
    assert result.returncode == exit_code
