"""A process that aborts in the middle of a session of mode `blinded`, with a seed that is known: what is left of it has
neither seed, keys and pads nor private activations."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import resource
import signal
import struct
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from models import RandomModel, model_folder, random_token_ids

from tsqp_shm import LLM, SamplingParams, _native
from tsqp_shm.model.network import Network
from tsqp_shm.shm.posix.folder import sessions_folder, sweep_dead_sessions
from tsqp_shm.shm.posix.objects import arena_name

SEED = bytes(np.random.default_rng(16).integers(0, 256, 32, np.uint8))
PROMPT = list(random_token_ids(40, seed=99))
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
SETTINGS: dict[str, Any] = {
    "mode": "blinded", "pads_out": "wait", "prefill": "gpu", "pad_stock": 300,
    "max_model_len": 96, "max_num_seqs": 1, "max_batch_tokens": 32, "block_rows": 16,
}  # fmt: skip
SOUGHT = ("seed", "slot x", "logits")
PR_SET_DUMPABLE = 4
# Of each needle, so that none is found by chance.
NEEDLE_BYTES = 32


def with_known_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _native.PadKeys
    monkeypatch.setattr(_native, "PadKeys", lambda *arguments: made(*arguments, seed=SEED))


def needles_of(llm: LLM) -> dict[str, bytes]:
    """What nobody else is to hold: by the derivation of native/pads/keys.h, and as it lies in private slots."""
    connection = llm.runtime.connection
    session, digest = connection.session.name.encode(), connection.loaded.linears_digest.encode()
    context = struct.pack(">H", len(session)) + session + struct.pack(">H", len(digest)) + digest + bytes(8)

    def expanded(info: bytes, size: int) -> bytes:
        return _native.hkdf_sha256(b"tsqp-shm pads 1", SEED, info, size)

    # Or what is looked for were not what there is.
    assert expanded(b"key id" + context, 16).hex() == llm.bring_up()["pads"]["key_id"]
    found = {"seed": SEED}
    linears = Network.of(llm.spec).linears
    for linear in (linears[0], linears[-1]):
        key = expanded(b"pad key" + context + struct.pack(">I", linear.index), 32)
        found[f"key of {linear.role}"] = key
        for row in (0, 1, 5):
            found[f"pad {row} of {linear.role}"] = _native.draw_pads(key, row, linear.inputs)[:8].tobytes()
    for slot in connection.plan.private_slots:
        found[f"slot {slot.name}"] = connection.slots.view(slot)[0, :8].tobytes()
    found["logits"] = llm.logits(PROMPT)[-1, :8].tobytes()
    found["token ids"] = np.array(PROMPT[:8], np.int32).tobytes()
    assert all(len(needle) == NEEDLE_BYTES and len(set(needle)) > 4 for needle in found.values())
    return found


def found_in(content: bytes, needles: dict[str, bytes]) -> set[str]:
    return {name for name, needle in needles.items() if needle in content}


def own_memory(memory: BinaryIO, needles: dict[str, bytes]) -> dict[str, list[str]]:
    """What this process's memory holds, read through a descriptor from before it was hardened.

    Returns:
        What lies where pages are locked, left out of cores and wiped in a forked child; and of `SOUGHT`, as there is
        much of it, what lies elsewhere.
    """
    sought = {name: needles[name] for name in SOUGHT}
    secret, other, first, end = set(), set(), 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if region := re.match(r"([0-9a-f]+)-([0-9a-f]+) (rw-p)?", line):
            first, end = int(region[1], 16), int(region[2], 16) if region[3] else 0
        elif line == "Rss:                   0 kB":
            # Never touched.
            end = 0
        elif line.startswith("VmFlags:") and end:
            memory.seek(first)
            with contextlib.suppress(OSError):
                content = memory.read(end - first)
                if {"lo", "dd", "wf"} <= set(line.split()):
                    secret |= found_in(content, needles)
                else:
                    other |= found_in(content, sought)
    return {"secret": sorted(secret), "other": sorted(other)}


def allow_core() -> int:
    """Has this process leave a core as far as it may, though the one that forked it forbade that. Returns the limit."""
    assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    return hard


def play(fast, model: Path, folder: Path, ready: int, go: int) -> None:
    """A session that ends well and leaves all files that it may, then one in whose middle the process aborts."""
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # What it says of where it was when it aborted.
    faulthandler.enable(output)
    allow_core()
    memory = Path("/proc/self/mem").open("rb", buffering=0)  # noqa: SIM115
    monkeypatch = pytest.MonkeyPatch()
    with_known_seed(monkeypatch)
    needles = {}
    with LLM(
        model, start_gpu=lambda session: fast.start_gpu(model, session), session="known1", timeout_s=30.0,
        trace="tee.recording", evidence="evidence.json", **SETTINGS,
    ) as llm:  # fmt: skip
        llm.generate([PROMPT], PARAMS)
        needles |= {f"{name}, of a session that ended": needle for name, needle in needles_of(llm).items()}
    llm = LLM(
        model, start_gpu=lambda session: fast.start_gpu(model, session), session="known2", timeout_s=30.0, **SETTINGS
    )
    llm.generate([PROMPT], PARAMS)
    live = needles_of(llm)
    held = own_memory(memory, live)
    needles |= live
    told = {"needles": {name: needle.hex() for name, needle in needles.items()}, **held}
    os.write(ready, json.dumps(told).encode() + b"\n")
    os.close(ready)
    os.read(go, 1)
    os.abort()


def test_what_is_left_of_a_process_that_aborts_holds_none_of_its_secrets(fast, tmp_path, forked):
    model = model_folder(RandomModel("llama"))
    folder = tmp_path / "place"
    folder.mkdir()

    def run() -> None:
        told, ready = os.pipe()
        go, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(told)
                play(fast, model, folder, ready, go)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(9)
        os.close(ready)
        with os.fdopen(told, "rb") as lines:
            line = lines.readline()
        assert line, (folder / "output").read_text()
        facts = json.loads(line)
        needles = {name: bytes.fromhex(needle) for name, needle in facts["needles"].items()}
        # The search finds what is there. Where keys are kept they are alone: the seed, which this test has given, was
        # wiped when they were made of it.
        assert facts["other"] == sorted(SOUGHT)
        assert facts["secret"] == ["key of lm_head", "key of qkv"]
        with Path("/dev/shm" + arena_name("known2")).open("rb") as arena:
            session_files = list((sessions_folder() / "known2").iterdir())
            os.write(tell, b"x")
            _, status = os.waitpid(pid, 0)
            left = arena.read()
        assert os.WTERMSIG(status) == signal.SIGABRT
        assert not os.WCOREDUMP(status)
        assert b"known2" in left
        assert found_in(left, needles) == set()
        assert {path.name for path in session_files} >= {"lock", "stats"}
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert set(files) == {"output", "tee.recording", "evidence.json"}
        assert b"Fatal Python error: Aborted" in files["output"]
        assert files["tee.recording"]
        assert json.loads(files["evidence.json"])
        for content in files.values():
            assert found_in(content, needles) == set()
            text = content.decode(errors="replace").lower()
            assert not any(needle.hex() in text for needle in needles.values())
        assert sweep_dead_sessions() == ["known2"]

    forked(run).join()


def test_a_core_is_searched_where_one_is_written(tmp_path, forked):
    """That a process without the precautions leaves one here, with what it held: else none would prove nothing."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if not re.fullmatch(r"[\w.%-]+", pattern):
        pytest.skip(f"cores go to {pattern!r}")

    def run() -> None:
        os.chdir(tmp_path)
        if 0 <= allow_core() < 1 << 28:
            return
        pid = os.fork()
        if pid == 0:
            code = f"import os; kept = bytes(reversed(bytes.fromhex('{SEED[::-1].hex()}'))); os.abort()"
            os.execv("/proc/self/exe", ["python", "-c", code])
        _, status = os.waitpid(pid, 0)
        assert os.WCOREDUMP(status)
        (core,) = tmp_path.iterdir()
        assert found_in(core.read_bytes(), {"seed": SEED}) == {"seed"}
        core.unlink()

    forked(run).join()
