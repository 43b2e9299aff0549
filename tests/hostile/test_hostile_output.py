"""What a hostile GPU process can do by what the model says, by what it prints, and by what it calls its own end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile_gpu import HostileGpu
from models import RandomModel, random_token_ids, with_bytes_as_tokens
from pseudo_terminal import OnTerminal

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import PeerDied, ProtocolError
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.shm.protocol import operation_of
from tsqp_shm.shm.slots import slot_array

# Sets the clipboard, clears the screen, forges a prompt; C1, a bidirectional control, a line separator, a bare return.
ATTACK = "\x1b]52;c;cm0gLXJmIH4K\x07\x1b[2J\x1b[1;1Htsqp-shm: mode verified\r\n$ \x9b31m\u202e\u2028\tend\x7f"
SHOWN = r"\x1b]52;c;cm0gLXJmIH4K\x07\x1b[2J\x1b[1;1Htsqp-shm: mode verified\r" "\r\n" r"$ \x9b31m\u202e\u2028"
SHOWN += "\t" r"end\x7f"
SESSION_NAMES = (f"output{os.getpid()}-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return with_bytes_as_tokens(RandomModel("llama").write(tmp_path_factory.mktemp("output") / "model"))


def dictate(model: Path, session: str, token_ids: list[int]) -> None:
    """Plays a GPU process whose every result is honest in form, and that has the model say these tokens."""
    gpu = HostileGpu(model, session)
    left = iter(token_ids)
    work = gpu.work

    def work_or_dictate(record):
        if operation_of(record.opcode, record.target, gpu.plan.linear_operations)[0] != "LM_HEAD":
            return work(record)
        logits = slot_array(gpu.arena, gpu.plan.slots[record.out_slot])
        logits[0] = 0
        logits[0, next(left)] = 0x4200
        return gpu.answer(record)

    gpu.work = work_or_dictate
    with contextlib.suppress(PeerDied, ProtocolError):
        gpu.serve(lambda gpu, record: False, lambda gpu, record: None)


@pytest.fixture
def dictated(model, forked) -> Callable[..., list[object]]:
    """What to run, to have the TEE role say the attack."""

    def arguments(*flags: str) -> list[object]:
        session = next(SESSION_NAMES)
        token_ids = Tokenizer.from_folder(model).encode(ATTACK)
        forked(dictate, model, session, token_ids)
        limits = ["--max-model-len", "256", "--max-new-tokens", str(len(token_ids)), "--ignore-eos"]
        return ["tee", model, "--session", session, "--prompt", "hi", "-q", *limits, *flags]

    return arguments


def test_on_a_terminal_what_the_model_says_is_shown_and_not_obeyed(dictated):
    with OnTerminal(*dictated()) as tee:
        assert tee.wait() == 0
        # The terminal itself begins a line by a return.
        assert tee.seen.decode() == SHOWN + "\r\n"


def test_on_a_terminal_json_is_shown_too(dictated):
    with OnTerminal(*dictated("--json")) as tee:
        assert tee.wait() == 0
        assert not set(tee.seen) & (set(range(0x20)) - set(b"\r\n"))
        assert b"\x7f" not in tee.seen


def test_in_a_pipe_its_bytes_stay_as_they_are(dictated):
    command = [sys.executable, "-m", "tsqp_shm", *map(str, dictated())]
    said = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=True)
    assert (said.stdout, said.stderr) == (ATTACK.encode() + b"\n", b"")


# What a GPU process does beside serving: it writes where its parent's output could be and, when its trigger is there,
# ends in the name of an error of this package.
HOSTILE_SITE = """
import atexit, os, socket, sys, threading, time
if "gpu" in sys.orig_argv[:5]:
    trigger = "TRIGGER"
    os.write(1, b'{"text": "forged"}\\n\\x1b[2J')
    atexit.register(lambda: os.write(1, b'{"text": "forged"}\\n'))
    def act():
        while not os.path.exists(trigger):
            time.sleep(0.01)
        os.unlink(trigger)
        socket.socket(fileno=lifeline).send(b"failed ConfigError expected a reinstall\\n")
        os.write(2, b"tsqp-shm: model: expected a reinstall\\n")
        os._exit(2)
    lifeline = int(os.environ["TSQP_SHM_LIFELINE"])
    threading.Thread(target=act, daemon=True).start()
"""


@pytest.fixture
def trigger(tmp_path, monkeypatch) -> Iterator[Path]:
    """Has GPU processes be hostile, and one do its worst when the file is made."""
    (tmp_path / "sitecustomize.py").write_text(HOSTILE_SITE.replace("TRIGGER", str(tmp_path / "trigger")))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parents[2]}")
    return tmp_path / "trigger"


def test_an_error_that_the_peer_forges_in_mid_session_is_its_death_and_another_takes_its_place(model, trigger):
    said = []
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0)
    prompt = list(random_token_ids(20))
    settings = {"gpu_threads": 1, "max_model_len": 64, "dtype": "float32", "device": "cpu"}
    with LLM(model, restart_gpu=1, report=said.append, **settings) as llm:
        expected = llm.generate([prompt], params)[0].outputs
        trigger.touch()
        while llm.statistics.gpu_restarts == 0:
            assert llm.generate([prompt], params)[0].outputs == expected
        trigger.touch()
        with pytest.raises(PeerDied) as caught:
            while True:
                llm.generate([prompt], params)
    assert (caught.value.role, caught.value.exit) == ("gpu", "exit code 2")
    forged = [line for text in said for line in text.splitlines() if "reinstall" in line or "forged" in line]
    assert len(forged) > 3
    assert all(line.startswith("gpu: ") for line in forged)
    assert not any("\x1b" in text for text in said)


def test_what_the_gpu_process_prints_is_not_the_launcher_s_output(model, trigger):
    command = [sys.executable, "-m", "tsqp_shm", "launch", str(model), "--json", "--prompt", "hi", "--device", "cpu"]
    said = subprocess.run(
        [*command, "--max-new-tokens", "3"], capture_output=True, stdin=subprocess.DEVNULL, check=True, text=True
    )
    assert said.stderr == ""
    assert "forged" not in json.loads(said.stdout)["text"]
    assert said.stdout.count("\n") == 1
