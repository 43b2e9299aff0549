"""`tsqp-shm bench modes`: every mode has a row for each case, and who has no turn is stopped and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import RandomModel, model_folder
from process_table import children

from tsqp_shm.bench import asleep
from tsqp_shm.bench.modes.run import ModesOptions, run_modes
from tsqp_shm.modes import MODES

LABELS = ["plain", "verified", "blinded stocked", "blinded sustained", "tee-only"]
CASES = ["prefill", "decode", "batch"]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(pid: int, states: str) -> None:
    while state_of(pid) not in states:
        os.sched_yield()


def table_of(labels: list[str], capsys, monkeypatch, tmp_path) -> tuple[dict, str]:
    """A run of a small model with these modes alone: its JSON and what it prints."""
    # Whoever wakes is as fast as he will be.
    monkeypatch.setattr(asleep, "WAKING_S", 0.0)
    modes = tuple(dict.fromkeys(label.split()[0] for label in labels))
    file = tmp_path / "modes.json"
    options = ModesOptions(
        str(model_folder(RandomModel("llama"))), modes, tokens=(12, 5, 4), new_tokens=3, runs=1, threads=1,
        pad_threads=1, device="cpu", json_file=str(file), quiet=True,
    )  # fmt: skip
    assert run_modes(options, Path) == 0
    return json.loads(file.read_text()), capsys.readouterr().out


def check(document: dict, printed: str, labels: list[str]) -> None:
    found = [(row["case"], row["label"]) for row in document["rows"]]
    assert found == [(case, label) for case in CASES for label in labels]
    for row in document["rows"]:
        mode = MODES[row["mode"]]
        assert (row["bytes_to_gpu"] is not None) == mode.has_gpu_process
        assert (row["pads"] is not None) == mode.has_pads
        assert row["median_s"] > 0
    rows = {(row["case"], row["label"]): row for row in document["rows"]}
    for case in CASES if "blinded stocked" in labels else ():
        stocked, sustained = rows[case, "blinded stocked"], rows[case, "blinded sustained"]
        assert stocked["pads"]["tee_products"] == sustained["pads"]["tee_products"] == 0
        assert min(stocked["pads"]["used"], sustained["pads"]["used"]) > 0
        assert stocked["pads"]["burned"] == sustained["pads"]["burned"] == 0
        # What waits for pads is made while it lasts.
        assert sustained["pads"]["made"] > 0
    if {"verified", "blinded stocked"} <= set(labels):
        # The same words cross.
        assert rows["prefill", "blinded stocked"]["bytes_to_gpu"] == rows["prefill", "verified"]["bytes_to_gpu"]
    assert max(map(len, printed.splitlines())) <= 100
    for mode in {label.split()[0] for label in labels}:
        assert f"{mode}: {MODES[mode].summary}" in printed


def test_modes_have_a_row_for_each_case_and_say_what_they_protect(capsys, monkeypatch, tmp_path):
    labels = LABELS[2:4]
    document, printed = table_of(labels, capsys, monkeypatch, tmp_path)
    check(document, printed, labels)
    assert document["outlook"] is None
    assert "No forecast" in printed


@pytest.mark.long
def test_all_modes_side_by_side_have_a_forecast(capsys, monkeypatch, tmp_path):
    document, printed = table_of(LABELS, capsys, monkeypatch, tmp_path)
    check(document, printed, LABELS)
    outlook = document["outlook"]
    assert {row["label"] for row in outlook["beside_measured"]} == set(LABELS[1:])
    assert [machine["name"] for machine in outlook["machines"]] == ["A", "B", "C"]
    assert all(value > 0 for name, value in outlook["costs"].items() if name != "splits_rows")
    for machine in outlook["machines"]:
        assert " ".join(machine["in_words"].split()) in " ".join(printed.split())


def test_who_is_put_to_sleep_takes_no_time_nor_do_its_children():
    child = "import os, time; os.fork(); [None for _ in iter(int, 1)]"
    process = subprocess.Popen([sys.executable, "-c", child])
    try:
        while not children(process.pid):
            os.sched_yield()
        (born,) = children(process.pid)
        asleep.put_to_sleep(process.pid)
        for pid in (process.pid, born):
            wait_for(pid, "T")
        asleep.wake(process.pid, gently=False)
        for pid in (process.pid, born):
            wait_for(pid, "RS")
    finally:
        os.kill(born, signal.SIGKILL)
        process.kill()
        process.wait()


def test_who_sleeps_wakes_where_the_one_that_stopped_it_is_killed():
    sleeper = (
        "from tsqp_shm.bench.asleep import wake_when_parent_dies; import os, sys\n"
        "wake_when_parent_dies(); print(os.getpid(), flush=True); sys.stdin.read()"
    )
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}], stdin=sys.stdin); "
        "sys.stdin.close(); import signal; signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    pid = int(process.stdout.readline())
    os.kill(pid, signal.SIGSTOP)
    wait_for(pid, "T")
    process.kill()
    process.wait()
    wait_for(pid, "RS")
    # It hears that nothing more comes, and ends by itself.
    process.stdin.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and state_of(pid) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.stdout.close()
