"""A server whose GPU process is killed, or turns against it, while it streams."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from models import RandomModel, with_bytes_as_tokens
from process_table import children
from servers import Server, demo_server

from tsqp_shm import LLM, SamplingParams

COMPLETIONS = "/v1/completions"
PROMPTS = ["Who goes there?", "Nobody, sir.", "Then who", "speaks?"]
# In the GPU process: its products of a Linear are false from the 40th on.
HOSTILE_SITE = """
import sys
if "gpu" in sys.orig_argv[:5]:
    import numpy as np
    from tsqp_shm.gpu.field_products import NativeFieldProducts
    done = 0
    linear = NativeFieldProducts.linear
    def hostile_linear(self, record):
        global done
        done += record.target == 1
        if done == 40:
            weights = self._linears[1]
            row = weights.quantised(0, 1).astype(np.float32)
            row[0, 0] += 1 if row[0, 0] < 100 else -1
            weights.set_rows(0, row)
        linear(self, record)
    NativeFieldProducts.linear = hostile_linear
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    fields = {"vocab_size": 256}
    return with_bytes_as_tokens(RandomModel("llama", fields).write(tmp_path_factory.mktemp("serve") / "model"))


@pytest.fixture(scope="module")
def answers(model) -> list[str]:
    """Of the same arithmetic, in this process."""
    with LLM(model, mode="tee-only") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        return [output.outputs[0].text for output in llm.generate(PROMPTS, params)]


def asked(prompt: str) -> dict[str, object]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 200, "ignore_eos": True}


def kill_gpu_process(server: Server) -> None:
    (gpu,) = [
        pid for pid in children(server.process.pid) if b"gpu" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]
    os.kill(gpu, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["verified", "blinded"])
def test_streams_go_on_where_another_gpu_process_takes_over_and_nothing_comes_twice(model, answers, mode):
    with demo_server(model, "--mode", mode, "--device", "cpu", "--restart-gpu", 1) as server:
        with ExitStack() as stack:
            streams = [stack.enter_context(server.streaming(COMPLETIONS, asked(prompt))) for prompt in PROMPTS]
            texts = [next(stream)["choices"][0]["text"] for stream in streams]
            kill_gpu_process(server)
            for index, stream in enumerate(streams):
                texts[index] += "".join(event["choices"][0]["text"] for event in stream)
        assert texts == answers
        assert server.metric("tsqp:gpu_restarts_total") == 1


@pytest.mark.parametrize("policy", ["exit", "lock"])
def test_a_false_result_ends_every_request_with_one_code_and_the_process_with_4(model, answers, tmp_path, policy):
    (tmp_path / "sitecustomize.py").write_text(HOSTILE_SITE)
    environment = {"PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))}
    evidence = tmp_path / "evidence.json"
    server = demo_server(
        model, "--mode", "verified", "--device", "cpu", "--evidence", evidence, "--restart-gpu", 1,
        "--on-integrity", policy, environment=environment,
    )  # fmt: skip
    with server, server.streaming(COMPLETIONS, asked(PROMPTS[0])) as stream:
        *pieces, last = stream
        assert last["error"]["code"] == "integrity_error"
        text = "".join(piece["choices"][0]["text"] for piece in pieces)
        assert 0 < len(text) < len(answers[0]) and answers[0].startswith(text)
        if policy == "lock":
            assert server.get("/health")[0] == 503
            status, answer = server.post(COMPLETIONS, asked("a"))
            assert (status, answer["error"]["code"]) == (503, "integrity_error")
            assert server.get("/live")[0] == 200 and server.process.poll() is None
        else:
            server.process.wait(30)
    assert server.process.returncode == 4
    assert json.loads(evidence.read_text())["session"]["failures"][0]["error"] == "IntegrityError"


def test_a_session_that_is_over_is_503_until_somebody_ends_the_server(model):
    with demo_server(model, "--mode", "plain", "--device", "cpu") as server:
        kill_gpu_process(server)
        status, answer = server.post(COMPLETIONS, asked("a"))
        assert (status, answer["error"]["code"]) == (503, "PeerDied"), answer
        assert server.get("/health")[0] == 503 and server.get("/live")[0] == 200
        assert server.stop() == 0
