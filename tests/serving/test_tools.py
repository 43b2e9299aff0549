"""What people point at a server: lm-eval, guidellm, locust, each as it comes.

They sit in an environment of their own, whose bin folder TSQP_SHM_SERVING_TOOLS names:
python -m venv TOOLS && TOOLS/bin/pip install 'lm-eval[api]' guidellm locust.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from servers import Server

from tsqp_shm import LLM

pytestmark = pytest.mark.serving

QUESTIONS = [
    ("The capital of France is", ["Paris", "London", "Rome"], 0),
    ("Two plus two equals", ["four", "seven", "a hundred and one"], 0),
    ("The sun rises in the", ["west", "east"], 1),
    ("Water freezes at zero degrees", ["Celsius", "Fahrenheit, as everybody knows"], 0),
]
TASK = """
task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""
LOCUST = """
import json, random
from locust import HttpUser, between, task

class Client(HttpUser):
    wait_time = between(0.0, 0.05)

    @task(3)
    def chat(self):
        words = " ".join(random.choices("one two three four five six".split(), k=random.randint(1, 40)))
        body = {"messages": [{"role": "user", "content": words}], "max_tokens": random.randint(1, 8)}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as response:
            if response.status_code != 200 or not response.json()["choices"]:
                response.failure(response.text)

    @task(1)
    def stream(self):
        body = {"prompt": "One", "max_tokens": 4, "stream": True}
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as response:
            lines = [line for line in response.iter_lines() if line]
            if not lines or lines[-1] != b"data: [DONE]":
                response.failure("the stream has no end")
"""


@pytest.fixture(scope="module")
def tools() -> Path:
    folder = os.environ.get("TSQP_SHM_SERVING_TOOLS")
    if folder is None:
        pytest.skip("TSQP_SHM_SERVING_TOOLS names no folder with lm_eval, guidellm and locust")
    return Path(folder)


def run(*command: object, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_lm_eval_finds_the_log_likelihoods_of_a_session_in_process(server, tools, demo_model, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": q, "choices": c, "answer": a}) + "\n" for q, c, a in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    where = f"model={demo_model.name},base_url={server.url}/v1/completions,tokenizer_backend=remote,num_concurrent=4"
    out = tmp_path / "out"
    print(
        run(
            tools / "lm_eval", "run", "--model", "local-completions", "--model_args", where, "--tasks",
            "local_questions", "--include_path", tmp_path, "--output_path", out, "--log_samples", folder=tmp_path,
        )
    )  # fmt: skip
    (samples,) = out.rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    scores = {sample["doc"]["question"]: [float(each[0][0]) for each in sample["resps"]] for sample in found}
    with LLM(demo_model, mode="tee-only") as llm:
        for question, choices, _ in QUESTIONS:
            # lm-eval has a space between the two.
            expected = [scored(llm, question, f" {choice}") for choice in choices]
            assert scores[question] == pytest.approx(expected, abs=2e-3)


def scored(llm: LLM, question: str, choice: str) -> float:
    """The log-likelihood of a continuation, by the logits."""
    context, ids = llm.tokenizer.encode(question), llm.tokenizer.encode(question + choice)
    logits = llm.logits(ids).astype(np.float64)
    logits -= np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) + logits.max(
        -1, keepdims=True
    )
    return float(sum(logits[place - 1, ids[place]] for place in range(len(context), len(ids))))


def test_guidellm_ends_without_a_failed_request(server, tools, demo_model, tmp_path):
    report = tmp_path / "report.json"
    run(
        tools / "guidellm", "run", "--backend", f"kind=openai_http,target={server.url},model={demo_model.name}",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=32",
        "--tokenizer", f"kind=huggingface_auto,model={demo_model}",
        "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16",
        "--output", f"kind=json,path={report}", "--disable-progress", folder=tmp_path,
    )  # fmt: skip
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    print(totals)
    assert (totals["successful"], totals["errored"]) == (32, 0)


def test_locust_ends_without_a_failed_request_and_memory_stays_flat(server, tools, tmp_path):
    (tmp_path / "locustfile.py").write_text(LOCUST)

    def load(seconds: int) -> int:
        run(
            tools / "locust", "-f", "locustfile.py", "--headless", "-u", 12, "-r", 12, "-t", f"{seconds}s",
            "--host", server.url, "--csv", "run", "--exit-code-on-error", 1, folder=tmp_path,
        )  # fmt: skip
        with (tmp_path / "run_stats.csv").open() as file:
            total = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
        assert int(total["Failure Count"]) == 0
        return int(total["Request Count"])

    load(20)
    before = resident_bytes(server)
    count = load(60)
    grown = resident_bytes(server) - before
    print(f"{count} requests in 60 s, the process grew by {grown:,} bytes")
    assert count > 50
    assert grown < 8 << 20
    assert server.metric("tsqp:num_requests_running") == 0


def resident_bytes(server: Server) -> int:
    line = next(
        line for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) << 10
