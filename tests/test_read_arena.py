"""What crosses in clear gives away, by scripts/read_arena.py beside real sessions: a reader outside, who only reads."""

import subprocess
import sys
from pathlib import Path

import pytest

from tsqp_shm import LLM

SCRIPT = Path(__file__).parent.parent / "scripts" / "read_arena.py"
# Long enough that a layer takes a while: the reader looks now and then.
PROMPT = " ".join(
    f"On day {day} the keeper of the lighthouse wrote: wind from the {wind}, {ships} ships, nobody came to the door."
    for day, (wind, ships) in enumerate(zip(["north", "south-west", "east"] * 4, range(7, 19), strict=True), 1)
)


def read_beside(model: Path, session: str, *flags: str) -> tuple[str, dict[str, float]]:
    """What is read of a session that answers the prompt: the report, and how much of the prompt each way has found."""
    reader = subprocess.Popen(
        [sys.executable, SCRIPT, str(model), "--session", session, "--expect", PROMPT],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        command = ["launch", model, "--session", session, "--prompt", PROMPT, "--max-new-tokens", "3", "-q", *flags]
        subprocess.run([sys.executable, "-m", "tsqp_shm", *command], check=True, capture_output=True)
        report, _ = reader.communicate()
    finally:
        reader.kill()
        reader.wait()
    print(report)
    found = [line.partition(": ") for line in report.splitlines() if "of the expected" in line]
    return report, {title: float(rest.partition("%")[0]) for title, _, rest in found}


@pytest.mark.parametrize(
    ("mode", "doorbell"),
    [("plain", "adaptive"), ("plain", "spin"), pytest.param("verified", "adaptive", marks=pytest.mark.long)],
)
def test_a_reader_outside_rebuilds_the_prompt_from_token_ids_and_from_activations(demo_model, mode, doorbell):
    report, found = read_beside(demo_model, f"read-{mode}-{doorbell}", "--mode", mode, "--doorbell", doorbell)
    assert (found["token ids"] == 100) if mode == "plain" else ("token ids: do not cross" in report)
    assert found["activations"] > 95
    assert "ships, nobody came to the door" in report
    assert (": not uniform" in report) == (mode == "verified")


@pytest.mark.long
def test_of_blinded_a_reader_outside_has_uniform_words_and_finds_in_them_what_chance_finds(demo_model):
    """Every row crosses: the session waits for pads. The same readings of words drawn at random find as little."""
    flags = ["--mode", "blinded", "--pads-out", "wait", "--prefill", "gpu"]
    report, found = read_beside(demo_model, "read-blinded", *flags)
    assert "token ids: do not cross" in report
    # Of 334 tokens some are met by chance in a text of that length, in its order: a few.
    assert found["activations"] < 10
    assert found["random words in their place"] < 10
    assert "as uniform ones are" in report


def test_a_session_that_does_not_begin_is_one_clear_line(demo_model):
    done = subprocess.run(
        [sys.executable, SCRIPT, str(demo_model), "--session", "never", "--timeout", "0.1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no TEE process began session 'never'" in done.stderr.splitlines()[-1]


def test_of_a_session_without_a_gpu_process_there_is_nothing_to_read(demo_model):
    with LLM(demo_model, mode="tee-only", session="alone", max_model_len=64):
        done = subprocess.run(
            [sys.executable, SCRIPT, str(demo_model), "--session", "alone", "--timeout", "5"],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert "expected one whose mode has a GPU process" in done.stderr.splitlines()[-1]
