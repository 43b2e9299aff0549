"""What `plain` gives away, by scripts/read_arena.py beside real sessions: a reader outside, who only reads."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "read_arena.py"
# Long enough that a layer takes a while: the reader looks now and then.
PROMPT = " ".join(
    f"On day {day} the keeper of the lighthouse wrote: wind from the {wind}, {ships} ships, nobody came to the door."
    for day, (wind, ships) in enumerate(zip(["north", "south-west", "east"] * 4, range(7, 19), strict=True), 1)
)


@pytest.mark.parametrize("doorbell", ["adaptive", "spin"])
def test_a_reader_outside_rebuilds_the_prompt_from_token_ids_and_from_activations(demo_model, doorbell):
    session = f"read-{doorbell}"
    reader = subprocess.Popen(
        [sys.executable, SCRIPT, str(demo_model), "--session", session, "--expect", PROMPT],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        command = ["launch", demo_model, "--session", session, "--prompt", PROMPT, "--max-new-tokens", "3", "-q"]
        subprocess.run(
            [sys.executable, "-m", "tsqp_shm", *command, "--doorbell", doorbell], check=True, capture_output=True
        )
        report, _ = reader.communicate()
    finally:
        reader.kill()
        reader.wait()
    found = {line.split(":")[0]: line for line in report.splitlines() if "of the expected" in line}
    assert "100.0%" in found["token ids"]
    assert float(found["activations"].split(": ")[1].partition("%")[0]) > 95
    assert "ships, nobody came to the door" in report


def test_a_session_that_does_not_begin_is_one_clear_line(demo_model):
    done = subprocess.run(
        [sys.executable, SCRIPT, str(demo_model), "--session", "never", "--timeout", "0.1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no TEE process began session 'never'" in done.stderr.splitlines()[-1]
