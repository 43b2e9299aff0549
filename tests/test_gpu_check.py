"""The command for a machine with a CUDA device: its words; what it runs is tested where it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)


def test_nothing_is_missing_where_the_tests_run():
    found = run("--dry-run")
    assert (found.returncode, found.stdout) == (0, "nothing is missing\n")


def test_help_says_what_the_machine_needs():
    said = run("--help").stdout
    for word in ("compiler", "wheels", "--device cpu --quick", "JSON"):
        assert word in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "tpu"), "expected cpu, cuda or cuda:N"),
        (("--wheels", "/nowhere"), "/nowhere is no folder"),
        (("--runs", "0"), "expected 1 or more"),
        (("--json", "/nowhere/file.json"), "not in a folder that exists"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(arguments, said):
    found = run(*arguments)
    assert found.returncode == 2
    assert said in found.stderr


def test_without_a_device_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device")
    found = run()
    assert found.returncode == 1
    assert found.stdout.startswith("gpu_check: no CUDA device: ")
    assert "--device cpu" in found.stdout
