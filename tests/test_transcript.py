"""A recorded session is checked by a program that shares nothing with the package; one changed word fails."""

from __future__ import annotations

import ast
import itertools
import json
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from commands import run
from local_session import LocalGpus, with_device
from models import RandomModel, model_folder, random_token_ids, with_bytes_as_tokens
from recorded import CHECKER, MODELS, Session, copied, files_in, problems_of, recorded, words_of
from safetensors.torch import load_file, save_file

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import IntegrityError
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.field_products import NativeFieldProducts
from tsqp_shm.gpu.open_device import open_device as open_device_of
from tsqp_shm.shm.arena import Arena
from tsqp_shm.tee.receipts import nonces_path

PARAMS = SamplingParams(max_tokens=4, temperature=1.0, ignore_eos=True)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.family)
def session(request, tmp_path_factory, fast) -> Session:
    return recorded(request.param, tmp_path_factory.mktemp("recorded"), fast)


def test_a_recorded_session_agrees(session):
    done = subprocess.run([sys.executable, CHECKER, *session], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    requests = json.loads(session.evidence.read_text())["requests"]
    num_products = sum(part["products_checked"] for each in requests for part in each["completions"])
    # And the 20 rows of logits that were no request's.
    assert done.stdout == f"all agrees: {num_products + 20 * 9:,} rows of products\n"


def test_a_session_whose_gpu_process_died_agrees(tmp_path, fast):
    """What was multiplied of the pass that broke off is there, and the pass has no end."""
    model, files, deaths = model_folder(MODELS[0]), files_in(tmp_path), [30]

    def start_gpu(session):
        fast.start_gpu(model, session, dies_at=deaths.pop() if deaths else 0)

    with LLM(
        model, mode="verified", start_gpu=start_gpu, restart_gpu=1, timeout_s=30.0, max_model_len=32, **files
    ) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=6, temperature=1.0))
        assert llm.statistics.gpu_restarts == 1
    session = Session(model, **files)
    assert problems_of(session) == []
    evidence = json.loads(session.evidence.read_text())
    (part,) = evidence["requests"][0]["completions"]
    assert (part["passes"], part["rows"], evidence["session"]["failures"]) == (6, 8, [])


def test_answers_that_end_in_every_way_agree(tmp_path, fast):
    """By a stop token, at their length with the prompt scored, by a deadline at any moment, cancelled at any moment."""
    model, files = model_folder(MODELS[0]), files_in(tmp_path)
    limits = {"max_model_len": 96, "max_num_seqs": 3, "max_batch_tokens": 20, "block_rows": 8}
    many = SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)
    with fast.llm(model, mode="verified", **limits, **files) as llm:
        prompts = [random_token_ids(length, seed=length) for length in (3, 60, 17, 9)]
        stopped = replace(many, stop_token_ids=range(128))
        scored = replace(many, max_tokens=5, prompt_logprobs=2)
        llm.generate(prompts, [stopped, scored, replace(many, deadline_s=0.02), replace(many, deadline_s=1e-6)])
        pieces = llm.stream_completion(completion := llm.start(prompts[1], replace(many, max_tokens=30)))
        cancelling = threading.Timer(0.02, lambda: llm.runtime.cancel([completion]))
        cancelling.start()
        list(pieces)
        cancelling.join()
    endings = {
        part["finish_reason"]
        for each in json.loads(files["evidence"].read_text())["requests"]
        for part in each["completions"]
    }
    assert {"stop", "length", "deadline"} <= endings
    assert problems_of(Session(model, **files)) == []


@pytest.mark.parametrize("settings", [{"pads_out": "wait"}, {"pad_stock": "20", "pad_ready": 20}], ids=["all", "some"])
def test_a_session_of_blinded_agrees_wherever_its_products_were_computed(tmp_path, fast, settings):
    """Where all rows cross, and where pads run out in the middle: what was kept is told, and one more is found."""
    model, files = model_folder(MODELS[0]), files_in(tmp_path)
    limits = {"max_model_len": 96, "max_num_seqs": 2, "max_batch_tokens": 20, "block_rows": 8}
    with fast.llm(model, mode="blinded", prefill="gpu", **settings, **limits, **files) as llm:
        llm.generate([random_token_ids(length, seed=length) for length in (3, 40)], PARAMS)
    session = Session(model, **files)
    assert problems_of(session) == []
    evidence = json.loads(session.evidence.read_text())
    parts = [part for each in evidence["requests"] for part in each["completions"]]
    assert all(part["pads_used"] == part["products_checked"] > 0 for part in parts)
    assert any(part["products_in_tee"] for part in parts) == ("pad_stock" in settings)
    parts[0]["products_in_tee"] += 1
    session.evidence.write_text(json.dumps(evidence))
    assert problems_of(session)


@pytest.mark.slow
def test_a_launch_leaves_what_can_be_checked_and_computed_again(tmp_path):
    model = with_bytes_as_tokens(RandomModel("llama", {"vocab_size": 256}).write(tmp_path / "model"))
    files = files_in(tmp_path)
    flags = [word for name, path in files.items() for word in (f"--{name}", path)]
    asked = ["--prompt", "the third oak"]
    done = run("launch", model, "-q", "--mode", "verified", "--device", "cpu", "--max-new-tokens", 4, *flags, *asked)
    assert done.returncode == 0, done.stderr
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o600}
    assert problems_of(Session(model, **files)) == []
    done = run("replay", files["evidence"], model, "--nonce", nonces_path(files["evidence"]), *asked)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checker_knows_nothing_of_the_package():
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(CHECKER.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize("place", ["sent", "came back", "the last one"])
def test_one_changed_word_fails(session, tmp_path, place):
    session = copied(session, tmp_path)
    head, words = words_of(session)
    # BEGIN and its parts, then PRODUCT, Linear, first row, rows, and the words that were sent.
    first = 2 + 5 * int(words[1]) + 4
    linear = json.loads(head)["linears"][0]
    rows = int(words[first - 1])
    # The last word is an END, behind what came back of lm_head.
    at = {"sent": first + 1, "came back": first + rows * linear["inputs"] + 2, "the last one": len(words) - 2}[place]
    words[at] ^= 1
    session.transcript.write_bytes(head + words.tobytes())
    (problem,) = problems_of(session)
    operation = "lm_head, layer None" if place == "the last one" else "qkv, layer 0"
    assert problem.endswith(f"a product is false: {operation}")


def test_a_word_that_is_none_of_the_fields_fails(session, tmp_path):
    session = copied(session, tmp_path)
    head, words = words_of(session)
    # The same number, and another word.
    words[len(words) - 2] += 2**31 - 1
    session.transcript.write_bytes(head + words.tobytes())
    assert "a product is false: lm_head" in problems_of(session)[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda head, words: words[:-3], "the transcript is damaged: it ends within a record"),
        (lambda head, words: np.append(words, np.uint32(9)), "begins no record"),
        (lambda head, words: np.append(words, np.array([1, 1, 0, 0, 0, 5, 5], "<u4")), ""),
    ],
    ids=["cut", "junk", "a pass that has only begun"],
)
def test_what_is_no_transcript_is_told(session, tmp_path, change: Callable, said):
    session = copied(session, tmp_path)
    head, words = words_of(session)
    session.transcript.write_bytes(head + change(head, words).tobytes())
    found = problems_of(session)
    assert said in found[0] if said else not found


@pytest.mark.parametrize("name", ["passes", "rows", "wanted_rows", "products", "products_checked"])
def test_a_count_that_the_transcript_does_not_bear_out_fails(session, tmp_path, name):
    session = copied(session, tmp_path)
    evidence = json.loads(session.evidence.read_text())
    evidence["requests"][2]["completions"][1][name] += 1
    session.evidence.write_text(json.dumps(evidence))
    assert problems_of(session) == ["request 3, completion 1: the evidence counts otherwise"]


def test_a_request_that_the_evidence_leaves_out_fails(session, tmp_path):
    session = copied(session, tmp_path)
    evidence = json.loads(session.evidence.read_text())
    del evidence["requests"][1]
    session.evidence.write_text(json.dumps(evidence))
    assert problems_of(session) == ["request 2, completion 0: the evidence counts otherwise"]


def test_a_product_of_other_weights_fails(session, tmp_path):
    model = shutil.copytree(session.model, tmp_path / "model")
    for path in model.glob("*.safetensors"):
        weights = load_file(path)
        for name in weights:
            if name.endswith("layers.1.mlp.down_proj.weight"):
                weights[name][3] = -weights[name][3]
        save_file(weights, path)
    found = problems_of(Session(model, *session[1:]))
    assert [problem.partition(" of ")[0] for problem in found] == ["linears_digest", "model_digest"]


def with_one_false_word(monkeypatch, at: int) -> None:
    """Has the GPU roles of this process add 1 to a word of the product of that number."""
    arenas: list[Arena] = []

    def open_device(arena: Arena) -> Device:
        arenas.append(arena)
        return open_device_of("cpu", "auto", arena)

    with_device(open_device, monkeypatch)
    multiply, numbers = NativeFieldProducts.linear, itertools.count(1)

    def linear(self, record):
        multiply(self, record)
        if next(numbers) == at:
            slot = arenas[0].plan.slots[record.out_slot]
            offset = slot.offset_bytes + record.first_row * slot.row_bytes
            (word,) = struct.unpack_from("<I", arenas[0].buffer, offset)
            struct.pack_into("<I", arenas[0].buffer, offset, (word + 1) % (2**31 - 1))

    monkeypatch.setattr(NativeFieldProducts, "linear", linear)


def test_a_false_product_that_the_session_has_found_agrees_with_its_evidence(tmp_path, monkeypatch):
    model, files = model_folder(MODELS[0]), files_in(tmp_path)
    # Nine of a pass: the second one of the third.
    with_one_false_word(monkeypatch, 9 + 9 + 2)
    with (
        LocalGpus(model).llm(mode="verified", max_model_len=32, **files) as llm,
        pytest.raises(IntegrityError) as raised,
    ):
        llm.generate([[1, 2, 3]], PARAMS)
    assert (raised.value.operation, raised.value.layer) == ("o", 0)
    session = Session(model, **files)
    evidence = json.loads(session.evidence.read_text())
    assert evidence["session"]["failures"] == [{"error": "IntegrityError", "layer": 0, "operation": "o"}]
    (part,) = evidence["requests"][0]["completions"]
    assert (part["passes"], part["answer_tokens"]) == (2, 2)
    assert problems_of(session) == []
    # Who does not tell it is found out.
    evidence["session"]["failures"] = []
    session.evidence.write_text(json.dumps(evidence))
    assert problems_of(session) == ["pass 3: a product is false: o, layer 0"]
