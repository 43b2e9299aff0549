"""The latency benchmark runs, leaves nothing behind, and writes JSON of the promised shape."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tsqp_shm.bench._round_trips import RoundTrips
from tsqp_shm.bench.latency.waits import SCENES, TRIPS
from tsqp_shm.shm.posix.folder import sessions_folder

LATENCY = [sys.executable, "-m", "tsqp_shm", "bench", "latency"]
WAITS = [sys.executable, "-m", "tsqp_shm", "bench", "waits"]
ROW_KEYS = {"case", "mode", "payload_bytes", "p50_us", "p90_us", "p99_us", "max_us", "n"}
MODES = {"adaptive", "zmq", "spin"}
QUICK_BYTES = {8 << 10, 64 << 10}


@pytest.fixture(scope="module")
def document(tmp_path_factory, runtime_folder):
    file = tmp_path_factory.mktemp("bench") / "latency.json"
    command = [*LATENCY, "--quick", "--json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    return {"table": run.stdout, **json.loads(file.read_text())}


def below(table, head):
    """The lines under the titles, of which the first is this; what is above says where it was measured."""
    lines = table.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith(head)]
    return lines[place + 1 :]


def rows_of(document, case):
    return [row for row in document["rows"] if row["case"] == case]


def test_every_row_has_exactly_the_promised_keys(document):
    assert document.keys() == {"table", "environment", "rows", "ratios", "copies"}
    assert all(row.keys() == ROW_KEYS for row in document["rows"])


def test_the_doorbell_is_measured_in_every_mode(document):
    assert {row["mode"] for row in rows_of(document, "doorbell")} == MODES
    assert {row["payload_bytes"] for row in rows_of(document, "doorbell")} == {0}


def test_a_sleeping_peer_is_measured_as_its_own_case(document):
    assert [row["mode"] for row in rows_of(document, "doorbell-parked")] == ["adaptive"]


def test_slots_are_measured_in_every_mode_and_size(document):
    measured = {(row["mode"], row["payload_bytes"]) for row in rows_of(document, "slot")}
    assert measured == {(mode, size) for mode in MODES for size in QUICK_BYTES}


@pytest.mark.parametrize("case", ["zmq-raw", "zmq-msgpack"])
def test_baselines_carry_the_same_payloads(document, case):
    if case == "zmq-msgpack":
        pytest.importorskip("msgpack")
    assert {row["payload_bytes"] for row in rows_of(document, case)} == QUICK_BYTES


def test_percentiles_are_positive_and_in_order(document):
    for row in document["rows"]:
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"] <= row["max_us"]
        assert row["n"] > 0


def test_the_table_has_a_line_for_each_row(document):
    copies = document["copies"]
    about_copies = 1 if copies["reason"] else 1 + len(copies["rows"]) + len(copies["refused"])
    lines = below(document["table"], "case ")
    assert len(lines) == len(document["rows"]) + len(document["ratios"]) + about_copies


def test_the_environment_says_what_was_measured_on(document):
    expected = {"tsqp_shm", "python", "libzmq", "cores", "spin_us", "yield_us", "rounds"}
    assert expected <= document["environment"].keys()


def test_json_to_stdout_is_nothing_but_json():
    command = [*LATENCY, "--quick", "--runs", "1", "--json", "-"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout).keys() == {"environment", "rows", "ratios", "copies"}


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_by_its_exit_code_and_leaves_nothing_behind(signal_number):
    command = [*LATENCY, "--max-bytes", "8192", "--runs", "1000000", "--limit-s", "1e9"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        # The peer has a process once both are measuring, or about to.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and not children.read_text():
            os.sched_yield()
        process.send_signal(signal_number)
        assert process.wait(timeout=30) == 128 + signal_number
    finally:
        process.kill()
        process.wait()
    assert not [path for path in sessions_folder().iterdir() if path.name.startswith("bench-")]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two sides that spin need two cores")
def test_the_native_ring_is_measured_beside_a_bare_ping_pong(document):
    (bare,), (ring,) = rows_of(document, "ping-pong"), rows_of(document, "ring")
    assert document["ratios"]["ring native / ping-pong native"] == ring["p50_us"] / bare["p50_us"]


def test_a_native_side_whose_other_side_is_gone_gives_up(forked):
    def wait_alone():
        with mmap.mmap(-1, 1 << 16) as words, pytest.raises(RuntimeError, match="does not answer"):
            RoundTrips(words, leads=True, patience_s=0.05).ping_pong(1, 1)
        with mmap.mmap(-1, 1 << 16) as words, pytest.raises(RuntimeError, match="does not answer"):
            RoundTrips(words, leads=False, patience_s=0.05).ring(1, 1, 1000)

    forked(wait_alone).join()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the scenes need two cores")
def test_every_pair_of_thresholds_is_measured_in_every_scene(tmp_path):
    drawn = importlib.util.find_spec("matplotlib") is not None
    plot = ["--plot", str(tmp_path / "waits.png")] if drawn else []
    command = [*WAITS, "--runs", "1", "--spin-us", "0,5", "--yield-us", "100", "--json", str(tmp_path / "waits.json")]
    run = subprocess.run([*command, *plot], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "waits.json").read_text())["rows"]
    expected = [(scene.name, spin, 100) for scene in SCENES for spin in (0, 5)]
    assert [(row["scene"], row["spin_us"], row["yield_us"]) for row in rows] == expected
    assert all(row["n"] == TRIPS and row["p50_us"] <= row["p90_us"] <= row["p99_us"] for row in rows)
    assert len(below(run.stdout, "scene ")) == len(rows)
    if drawn:
        assert (tmp_path / "waits.png").read_bytes().startswith(b"\x89PNG")
