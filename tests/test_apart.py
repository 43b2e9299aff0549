"""Whoever starts a process that is not trusted keeps it apart: from this process's secrets, streams and terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest

from tsqp_shm.bench.cases import OURS, Job, Turn
from tsqp_shm.bench.contenders import RunningContender
from tsqp_shm.bench.first_token import LaunchOptions, run_launch
from tsqp_shm.bench.latency.peer import Peer
from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.transport import run_trial
from tsqp_shm.doctor.versions import probe_torch
from tsqp_shm.errors import TsqpError
from tsqp_shm.trace.file import TraceFile

# Takes the interpreter's place: it writes down what it has, and is no use for anything else.
REPORTS = """
import json, os, pathlib, sys
place = pathlib.Path(sys.argv[0]).with_name("report.json")
report = {
    "environment": dict(os.environ), "leads": [os.getsid(0), os.getpgid(0)] == [os.getpid()] * 2,
    "streams": [os.readlink(f"/proc/self/fd/{number}") for number in range(3)],
}
place.write_text(json.dumps(report))
"""
SECRETS = {
    "HF_TOKEN": "hf_x",
    "NVIDIA_API_KEY": "k",
    "TORCH_TOKEN": "t",
    "LC_SECRET": "s",
    "https_proxy": "http://u:p@x",
}
NEEDED = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def probe(folder: Path) -> None:
    probe_torch()


def trial(folder: Path) -> None:
    run_trial("spin", None, EngineConfig())


def contender(folder: Path) -> None:
    job = Job(OURS, str(folder), (Turn("prefill", 1, 8),), threads=1, dtype="float32", device="cpu", timeout_s=30.0)
    running = RunningContender.start(job)
    try:
        running.wait_ready(30)
    finally:
        running.stop()


def first_text(folder: Path) -> None:
    (folder / "tokenizer.json").touch()
    run_launch(LaunchOptions(str(folder), vs="none", runs=1, quiet=True), Path)


def peer(folder: Path) -> None:
    running = Peer({})
    try:
        running.wait_done()
    finally:
        running.stop()


def merge(folder: Path) -> None:
    with TraceFile(folder / "trace.json", ("tee", "gpu"), lambda line: None) as trace:
        trace.recording("gpu").write_bytes(b"x")


@pytest.mark.parametrize("start", [probe, trial, contender, first_text, peer, merge])
def test_a_process_that_is_not_trusted_is_started_apart(start, tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\n{REPORTS}")
    program.chmod(0o700)
    for name, value in (SECRETS | NEEDED).items():
        monkeypatch.setenv(name, value)
    ours = {str(Path(f"/proc/self/fd/{number}").readlink()) for number in range(3)} - {"/dev/null"}
    monkeypatch.setattr(sys, "executable", str(program))
    with contextlib.suppress(TsqpError):
        start(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["leads"]
    assert not ours & set(report["streams"])
    assert not report["environment"].keys() & SECRETS.keys()
    assert report["environment"].items() >= NEEDED.items()
    assert "PATH" in report["environment"]
