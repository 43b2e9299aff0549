"""A process killed at any step of a session: the survivor names it, nothing is left, and the session begins again.

`scripts/kill_roles.py` does it: here each role before each record that it sends, and a few random moments; by hand both
sides of each record, and a thousand moments.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "kill_roles.py"
MOMENTS = 10


@pytest.fixture(scope="module")
def rows(tmp_path_factory, runtime_folder, demo_model) -> list[dict]:
    file = tmp_path_factory.mktemp("death") / "rows.json"
    command = [sys.executable, str(SCRIPT), "--steps", "--quick", "--moments", str(MOMENTS), "--json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    return json.loads(file.read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["gpu", "tee"])
def test_at_each_step_the_other_says_who_died_and_nothing_is_left(rows, victim):
    cases = [row for row in rows if row["victim"] == victim and " before " in row["moment"]]
    assert len(cases) > 10
    assert {(row["kind"], row["exit_code"]) for row in cases} == {("told", 3)}
    assert not any(row["found"] for row in cases)


@pytest.mark.slow
def test_at_a_random_moment_nothing_is_left_of_whatever_survives(rows):
    cases = [row for row in rows if " before " not in row["moment"] and row["victim"]]
    assert len(cases) == MOMENTS
    assert {row["kind"] for row in cases} <= {"told", "silent", "for the next", "too late"}


@pytest.mark.slow
def test_the_same_session_begins_again_after_all_of_them(rows):
    assert rows[0]["kind"] == rows[-1]["kind"] == "normal"
