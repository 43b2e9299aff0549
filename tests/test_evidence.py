"""What a session writes down of its requests: their counts and hashes, and nothing that they said."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from commands import assert_one_line, run
from models import RandomModel, with_bytes_as_tokens

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import ConfigError, EvidenceError, IntegrityError, PeerDied, TsqpError
from tsqp_shm.shm.posix.folder import sweep_dead_sessions
from tsqp_shm.tee import bring_up
from tsqp_shm.tee.caches import Keeper
from tsqp_shm.tee.tee_only import load_tee_only

GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=4, temperature=1.0, ignore_eos=True)
NUM_LAYER_LINEARS = 4 * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    fields = {"vocab_size": 256, "max_position_embeddings": 4096}
    return with_bytes_as_tokens(RandomModel("llama", fields).write(tmp_path_factory.mktemp("evidence") / "model"))


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "run.json"


@pytest.fixture
def llm(model, file) -> Iterator[LLM]:
    with LLM(model, mode="tee-only", max_model_len=256, max_num_seqs=4, evidence=file) as llm:
        yield llm


def read(file: Path) -> dict:
    content = file.read_bytes()
    found = json.loads(content)
    assert content == json.dumps(found, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"
    return found


def hashed(nonce: bytes, token_ids: list[int]) -> str:
    return "sha256:" + hashlib.sha256(nonce + struct.pack(f"<{len(token_ids)}I", *token_ids)).hexdigest()


def test_it_says_of_the_session_what_its_answers_are_held_to(llm, file):
    session = read(file)["session"]
    weights = llm.bring_up()["weights"]
    assert session["mode"] == "tee-only"
    assert (session["model_digest"], session["linears_digest"]) == (weights["model_digest"], weights["linears_digest"])
    assert session["model_digest"].startswith("sha256:")
    assert (session["is_pinned"], session["failures"], session["attestation"]) == (False, [], "none (simulation)")
    assert (session["field"], session["vectors"], session["maker"]) == (2**31 - 1, 0, None)


def test_a_request_is_counted_by_its_own_rows_whatever_runs_beside_it(llm, file):
    texts = ["a", "two words", "a third prompt " * 8]
    outputs = llm.generate(texts, GREEDY)
    for output, record in zip(outputs, read(file)["requests"], strict=True):
        (part,) = record["completions"]
        # Each token but the last has gone through the layers, and each token of the answer came of a row of lm_head.
        rows = len(output.prompt_token_ids) + 4
        assert (part["rows"], part["wanted_rows"], part["passes"]) == (rows, 5, 5)
        assert part["products"] == part["products_in_tee"] == rows * NUM_LAYER_LINEARS + 5
        assert (part["products_checked"], part["pads_used"], part["error"]) == (0, 0, None)
        assert (record["prompt_tokens"], part["answer_tokens"]) == (len(output.prompt_token_ids), 5)


def test_a_prompt_that_goes_in_chunks_and_is_scored_is_counted_by_its_passes(model, file):
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0, ignore_eos=True)
    with LLM(model, mode="tee-only", max_model_len=64, max_batch_tokens=8, evidence=file) as llm:
        llm.generate(["x" * 20], params)
    (part,) = read(file)["requests"][0]["completions"]
    assert (part["passes"], part["rows"], part["wanted_rows"]) == (3 + 1, 21, 19 + 2)


def test_only_the_nonce_opens_what_was_asked_and_answered(llm, file):
    output, other = llm.generate(["the same words", "the same words"], GREEDY)
    first, second = read(file)["requests"]
    assert output.receipt.request == first["request"]
    assert first["prompt"] == hashed(output.receipt.nonce, output.prompt_token_ids)
    assert first["completions"][0]["answer"] == hashed(output.receipt.nonce, output.outputs[0].token_ids)
    # Who has asked the same cannot see that somebody else has.
    assert other.receipt.nonce != output.receipt.nonce
    assert first["prompt"] != second["prompt"]
    assert "nonce" not in repr(output)
    assert output.receipt.nonce.hex() not in file.read_text()


def test_the_completions_of_a_prompt_are_one_request(llm, file):
    params = SamplingParams(n=3, max_tokens=4, temperature=1.0, ignore_eos=True)
    (output,) = llm.generate(["abc"], params)
    (record,) = read(file)["requests"]
    assert [part["index"] for part in record["completions"]] == [0, 1, 2]
    for part, answer in zip(record["completions"], output.outputs, strict=True):
        assert part["answer"] == hashed(output.receipt.nonce, answer.token_ids)


def test_what_lay_in_the_cache_of_an_earlier_request_is_not_counted_again(llm, file):
    keeper, asked = Keeper(), [[1, 2, 3, 4], [1, 2, 3, 9, 9]]
    for prompt in asked:
        completion = llm.start(prompt, GREEDY)
        completion.keeper = keeper
        list(llm.stream_completion(completion))
    first, second = (record["completions"][0] for record in read(file)["requests"])
    assert (first["cached_tokens"], first["cached_from"], first["rows"]) == (0, None, 4 + 4)
    assert (second["cached_tokens"], second["cached_from"], second["rows"]) == (3, 1, 2 + 4)
    assert second["products"] == second["products_in_tee"] == second["rows"] * NUM_LAYER_LINEARS + 5


def test_all_params_are_there_with_the_seed_that_was_drawn(llm, file):
    (output,) = llm.generate(["abc"], DRAWN)
    (record,) = read(file)["requests"]
    assert set(record["params"]) == {field.name for field in fields(SamplingParams)}
    assert record["params"]["seed"] == output.seed
    assert record["params"]["temperature"] == 1.0


def test_params_that_are_text_or_tokens_are_hashes(llm, file):
    given = {"stop": ["oak"], "stop_token_ids": [1, 2, 3], "bad_words": ["oak"], "logit_bias": {3: 0.5}}
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, allowed_token_ids=[1, 2, 3], **given)
    (output,) = llm.generate(["abc"], params)
    found = read(file)["requests"][0]["params"]
    assert found["stop"] == "sha256:" + hashlib.sha256(output.receipt.nonce + b'stop["oak"]').hexdigest()
    for name in (*given, "allowed_token_ids"):
        assert found[name].startswith("sha256:")
    # That two of them are equal is not told.
    assert len({found[name] for name in (*given, "allowed_token_ids")}) == len(given) + 1
    assert read_default_params(llm, file)["stop"] == []


def read_default_params(llm: LLM, file: Path) -> dict:
    llm.generate(["abc"], GREEDY)
    return read(file)["requests"][1]["params"]


def test_it_holds_no_word_of_a_request(llm, file):
    llm.generate(["the treasure lies under the third oak"], DRAWN)
    allowed = {"sha256", "mode", "tee-only", "length"}
    content = read(file)

    def texts(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for item in value.values():
                yield from texts(item)
        elif isinstance(value, list):
            for item in value:
                yield from texts(item)
        elif isinstance(value, str):
            yield value.partition(":")[0]

    assert set(texts(content["requests"])) <= allowed


def test_a_request_has_its_record_when_its_end_is_told(llm, file):
    completion = llm.start("abc", GREEDY)
    for _ in llm.stream_completion(completion):
        assert read(file)["requests"] == [] or completion.finish_reason is not None
    assert len(read(file)["requests"]) == 1


def test_an_answer_that_was_cancelled_is_recorded_as_far_as_it_came(llm, file):
    stream = llm.stream("abc", SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
    next(stream)
    stream.close()
    llm.generate(["what comes after it"], GREEDY)
    part = read(file)["requests"][0]["completions"][0]
    assert part["finish_reason"] == "cancelled"
    assert 0 < part["answer_tokens"] < 200


def failing_at(step: int, fault: TsqpError) -> Callable:
    """What loads an engine whose pass of that number ends in a fault."""

    def load(network, checkpoint, digest):
        make = load_tee_only(network, checkpoint, digest)

        def make_failing(*given):
            engine, count = make(*given), iter(range(1, 1000))
            forward = engine.forward

            def fail(chunks, take):
                if next(count) == step:
                    raise fault
                return forward(chunks, take)

            engine.forward = fail
            return engine

        return make_failing

    return load


def test_a_false_result_is_told_by_layer_and_operation_and_nothing_of_its_pass_is_counted(model, file, monkeypatch):
    fault = IntegrityError("down", 1)
    monkeypatch.setitem(bring_up.ALONE_ENGINES, "tee-only", failing_at(3, fault))
    with LLM(model, mode="tee-only", max_model_len=64, evidence=file) as llm, pytest.raises(IntegrityError) as raised:
        llm.generate(["abc"], GREEDY)
    assert (raised.value.operation, raised.value.layer) == ("down", 1)
    content = read(file)
    assert content["session"]["failures"] == [{"error": "IntegrityError", "layer": 1, "operation": "down"}]
    (part,) = content["requests"][0]["completions"]
    assert (part["passes"], part["answer_tokens"], part["finish_reason"]) == (2, 2, "cancelled")


def test_another_fault_is_told_by_its_class_alone(model, file, monkeypatch):
    monkeypatch.setitem(bring_up.ALONE_ENGINES, "tee-only", failing_at(1, PeerDied("gpu", "exit code 1", "last words")))
    with LLM(model, mode="tee-only", max_model_len=64, evidence=file) as llm, pytest.raises(PeerDied):
        llm.generate(["abc"], GREEDY)
    assert read(file)["session"]["failures"] == [{"error": "PeerDied"}]


def test_a_session_that_is_closed_has_not_failed(model, file):
    with LLM(model, mode="tee-only", max_model_len=256, evidence=file) as llm:
        next(llm.stream("abc", SamplingParams(max_tokens=200, ignore_eos=True)))
    assert read(file)["session"]["failures"] == []
    assert len(read(file)["requests"]) == 1


DIES = """
import os, signal, sys
from tsqp_shm import LLM, SamplingParams
llm = LLM(sys.argv[1], mode="tee-only", max_model_len=64, evidence=sys.argv[2])
llm.generate(["abc"], SamplingParams(max_tokens=3))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_leaves_the_records_of_what_had_ended(model, file):
    done = subprocess.run([sys.executable, "-c", DIES, str(model), str(file)], capture_output=True, check=False)
    sweep_dead_sessions()
    assert done.returncode == -signal.SIGKILL
    assert len(read(file)["requests"]) == 1
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_it_is_never_seen_half_written(model, file):
    with LLM(model, mode="tee-only", max_model_len=64, evidence=file) as llm:
        writing = os.fork()
        if writing == 0:
            # Looks until its parent has ended all of them.
            while len(read(file)["requests"]) < 30:
                pass
            os._exit(0)
        for _ in range(30):
            llm.generate(["abc"], SamplingParams(max_tokens=1))
        assert os.waitpid(writing, 0)[1] == 0


def test_what_cannot_be_written_ends_the_session_and_tells_no_token(llm, file):
    llm.generate(["abc"], GREEDY)
    file.unlink()
    file.mkdir()
    with pytest.raises(EvidenceError, match="cannot be written: Is a directory"):
        llm.generate(["abc"], GREEDY)


@pytest.mark.parametrize("path", ["nowhere/run.json", "."])
def test_a_file_that_could_not_be_written_is_refused_at_once(model, tmp_path, path):
    with pytest.raises(ConfigError, match="expected a file in a folder that exists"):
        LLM(model, mode="tee-only", evidence=tmp_path / path)


def test_plain_writes_none_as_nothing_holds_its_answers(model, file):
    with pytest.raises(ConfigError, match=r"^evidence: .* none, as mode plain is one where nothing holds its answers"):
        LLM(model, evidence=file)
    assert not file.exists()


@pytest.mark.parametrize("mode", ["plain", "tee-only"])
def test_a_mode_in_which_no_product_is_checked_has_no_transcript(model, file, mode):
    with pytest.raises(ConfigError, match=f"^transcript: .* none, as mode {mode} is one where no product .* checked"):
        LLM(model, mode=mode, transcript=file)
    assert not file.exists()


@pytest.mark.parametrize("name", ["run.json", "sub/../run.json", "run.nonces.json", "link"])
def test_one_file_for_two_things_is_refused_before_any_work(model, file, name):
    (file.parent / "sub").mkdir()
    (file.parent / "link").symlink_to(file)
    transcript = file.parent / name
    with pytest.raises(ConfigError, match=r"^transcript: .* a file of its own, as this one is of the evidence"):
        LLM(model, mode="verified", evidence=file, transcript=transcript)
    assert not file.exists()


def test_launch_keeps_what_opens_the_records_in_a_file_of_its_user_alone(model, file):
    flags = ["--mode", "tee-only", "--evidence", file, "--prompt", "abc", "--max-new-tokens", "3", "--stop", "zz"]
    done = run("launch", model, *flags, "--json")
    answer = json.loads(done.stdout)
    nonces = file.with_name("run.nonces.json")
    assert [path.stat().st_mode & 0o777 for path in (file, nonces)] == [0o600, 0o600]
    (opened,) = json.loads(nonces.read_text())["requests"]
    (record,) = read(file)["requests"]
    assert record["completions"][0]["answer"] == hashed(bytes.fromhex(opened["nonce"]), answer["token_ids"])
    assert opened["params"] == {"stop": ["zz"]}
    assert opened["nonce"] not in done.stdout + done.stderr


def test_a_launch_in_plain_refuses_it_in_one_line(model, file):
    assert_one_line(run("launch", model, "-q", "--evidence", file, "--prompt", "a"), 2, "evidence: ", "as mode plain")


def test_the_time_that_writing_takes_is_a_small_part_of_a_session_that_is_never_idle(model, file, monkeypatch):
    written = []
    original = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (time.sleep(0.05), written.append(to), original(self, to)))
    with LLM(model, mode="tee-only", max_model_len=256, max_num_seqs=2, evidence=file) as llm:
        llm.generate(["a"] * 40, SamplingParams(max_tokens=1))
    # At the beginning, after the first, at the end: what came between waited until it was due.
    assert len(written) < 10
    assert len(read(file)["requests"]) == 40
