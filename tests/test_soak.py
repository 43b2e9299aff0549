"""Mixed requests, cancellations and restarts for a while: nothing grows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "soak.py"
LONG_MINUTES = 10


def soak(tmp_path, minutes: float) -> dict:
    command = [sys.executable, str(SCRIPT), "--minutes", str(minutes), "--json", str(tmp_path / "soak.json")]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode in (0, 1), run.stderr
    return {"code": run.returncode, "table": run.stdout, **json.loads((tmp_path / "soak.json").read_text())}


@pytest.mark.long
def test_the_soak_runs_and_every_slot_cache_and_arena_is_free_again(tmp_path):
    """Seconds are too few to judge memory by."""
    found = soak(tmp_path, 0.08)
    assert found["done"]["batch"] > 0
    for name, wanted in (("slots_handed_over", 0), ("caches_in_use", 0), ("waiting", 0), ("arenas", 1)):
        assert {sample[name] for sample in found["samples"]} == {wanted}


@pytest.mark.long
def test_nothing_has_grown_after_ten_minutes(tmp_path):
    found = soak(tmp_path, LONG_MINUTES)
    assert found["code"] == 0, found["table"]
    assert found["restarts"] > 10
