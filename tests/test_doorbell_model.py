"""The doorbell's model: no error as built, and an error without any of the things that it needs."""

import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parent.parent / "native" / "proofs" / "doorbell.pml"
SLEEPS = "invalid end state"
MISREADS = "assertion violated"


@pytest.fixture
def check(tmp_path):
    if not shutil.which("spin"):
        pytest.skip("spin is not installed; apt install spin")

    def run(*defines: str) -> str:
        for command in (
            ["spin", "-a", *defines, MODEL],
            ["gcc", "-O1", "-w", "-DSAFETY", "-o", "pan", "pan.c"],
            ["./pan", "-m1000000"],
        ):
            done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout

    return run


def test_no_wake_up_and_no_record_is_lost(check):
    report = check()
    assert "errors: 0" in report
    assert "max search depth too small" not in report


@pytest.mark.parametrize(
    ("mutation", "error"),
    [
        ("NO_WRITER_FENCE", SLEEPS),
        ("NO_READER_FENCE", SLEEPS),
        ("NO_SECOND_LOOK", SLEEPS),
        ("DRAIN_WHEN_PARKED", SLEEPS),
        ("RELAXED_TAIL", MISREADS),
        ("EARLY_LOAD", MISREADS),
    ],
)
def test_without_it_the_doorbell_fails(check, mutation, error):
    report = check(f"-D{mutation}")
    assert "errors: 1" in report
    assert error in report
