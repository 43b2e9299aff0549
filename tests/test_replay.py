"""A request of a session's evidence, computed again: what agrees, and what is said of what does not."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import assert_one_line, run
from models import RandomModel, edit_config, with_bytes_as_tokens

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.cli import main
from tsqp_shm.errors import EvidenceError
from tsqp_shm.replay import Finding, compare, exit_code, read_request
from tsqp_shm.tee.receipts import Receipt, nonces_path, write_nonces

PROMPT = "the treasure lies under the third oak"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = with_bytes_as_tokens(
        RandomModel("llama", {"vocab_size": 256}).write(tmp_path_factory.mktemp("r") / "model")
    )
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def launched(model, tmp_path_factory) -> Path:
    """What a launch has written; an answer that was drawn."""
    file = tmp_path_factory.mktemp("launched") / "run.json"
    flags = ["--prompt", PROMPT, "--max-new-tokens", "6", "--temperature", "1", "--seed", "3", "--stop", "zzz"]
    done = run("launch", model, "-q", "--mode", "tee-only", "--evidence", file, *flags)
    assert done.returncode == 0
    file.with_name("answer.txt").write_text(done.stdout)
    return file


@pytest.fixture(scope="module")
def answer(launched) -> Path:
    """What that launch has printed."""
    return launched.with_name("answer.txt")


@pytest.fixture
def replayed(monkeypatch, capsys):
    """The command in this process, as a process of its own takes longer to begin than to compute."""
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)

    def replayed(file: Path, model: Path, *flags: object, nonces: Path | None = None) -> subprocess.CompletedProcess:
        words = ["replay", file, model, "-q", "--nonce", nonces or nonces_path(file), *flags]
        return subprocess.CompletedProcess(words, main([str(word) for word in words]), *capsys.readouterr())

    return replayed


def test_a_request_of_a_launch_agrees(model, launched):
    done = run("replay", launched, model, "--nonce", nonces_path(launched), "--prompt", PROMPT)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[:2] for line in done.stdout.splitlines()[1:5]]
    assert lines == [[name, "agrees:"] for name in ("model", "params", "prompt", "answer")]


def test_it_says_which_request_and_which_answer_it_has_computed(replayed, model, launched):
    """Who has written the files may have chosen params and ending: the requester is to see them."""
    said = replayed(launched, model, "--prompt", PROMPT, "--json").stdout
    params, prompt, answer = (finding["said"] for finding in json.loads(said)["findings"])
    seed = json.loads(launched.read_text())["requests"][0]["params"]["seed"]
    assert params == f"seed={seed}, stop=('zzz',), max_tokens=6"
    assert (prompt, answer) == (f"{len(PROMPT)} tokens", "6 tokens, ended by length")


def test_the_answer_is_printed_or_held_against_the_requester_s(replayed, model, launched, answer, tmp_path):
    told = replayed(launched, model, "--prompt", PROMPT).stdout
    assert told.endswith("answer, computed again, to be held against yours:\n" + answer.read_text())
    done = replayed(launched, model, "--prompt", PROMPT, "--answer", answer)
    assert (done.returncode, done.stdout.splitlines()[-1].split()[:2]) == (0, ["yours", "agrees:"])
    other = tmp_path / "other.txt"
    for changed in (b"x" + answer.read_bytes(), answer.read_bytes()[:-2] + b"\n", b""):
        other.write_bytes(changed)
        done = replayed(launched, model, "--prompt", PROMPT, "--answer", other)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (4, "  yours   DIFFERS: is another text")
    assert_one_line(replayed(launched, model, "--prompt", "a", "--answer", tmp_path / "none"), 2, "answer: got ")


@pytest.fixture
def forged(launched, tmp_path) -> Callable[[dict], Path]:
    """Evidence of the launch with other fields in the record of its completion."""

    def forged(fields: dict) -> Path:
        content = json.loads(launched.read_text())
        (part,) = content["requests"][0]["completions"]
        opened = json.loads(nonces_path(launched).read_text())["requests"][0]
        if fields.get("answer") == "of no token":
            fields = {**fields, "answer": Receipt(1, bytes.fromhex(opened["nonce"])).hash_tokens([])}
        part.update(fields)
        file = tmp_path / "run.json"
        file.write_text(json.dumps(content))
        shutil.copy(nonces_path(launched), nonces_path(file))
        return file

    return forged


def test_where_no_token_was_compared_nothing_agrees(replayed, model, forged):
    file = forged({"answer": "of no token", "answer_tokens": 0, "finish_reason": "cancelled"})
    done = replayed(file, model, "--prompt", PROMPT)
    assert done.returncode == 1
    said = "  answer  NOT COMPARED: has no token to compare: it ended by cancelled before"
    assert done.stdout.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": 1}, "might have 6 tokens by these params, and not 1"),
        ({"finish_reason": "deadline"}, "is said to have ended by a deadline, and there was none"),
        ({"answer_tokens": 5}, "is another one, of 6 tokens"),
        ({"finish_reason": "stop"}, "is the same, and ended by length"),
        ({"error": "NumericsError"}, "is the same, and ended by length"),
        ({"answer": "of no token", "answer_tokens": 0, "finish_reason": "error"}, "is another one, of 6 tokens"),
    ],
)
def test_a_record_that_makes_an_answer_end_elsewhere_is_another_answer(replayed, model, forged, fields, said):
    done = replayed(forged(fields), model, "--prompt", PROMPT)
    assert done.returncode == 4
    assert f"  answer  DIFFERS: {said}" in done.stdout.splitlines()


@pytest.mark.parametrize("indices", [[], [0, 0, 1], [0, 1], [0, 1, 3], [0, 1, 2, 3]])
def test_a_request_with_other_completions_than_were_asked_for_is_no_evidence(batch, tmp_path, indices):
    content = json.loads(batch[0].read_text())
    record = content["requests"][0]
    record["completions"] = [{**record["completions"][0], "index": index} for index in indices]
    file = tmp_path / "run.json"
    file.write_text(json.dumps(content))
    with pytest.raises(EvidenceError, match="its completions are not the 3 that were asked for, each once"):
        read_request(file, nonces_path(batch[0]), 1)


def test_an_answer_that_was_cut_is_said_to_be(replayed, model, batch):
    file, texts = batch
    done = replayed(file, model, "--request", 4, "--prompt", texts[3])
    assert done.returncode == 0
    assert "as far as it came; it was cut (cancelled), and of the rest nothing is said" in done.stdout


def test_one_answer_is_held_against_one_completion(replayed, model, batch, launched, answer):
    file, texts = batch
    done = replayed(file, model, "--request", 1, "--prompt", texts[0], "--answer", answer)
    assert_one_line(done, 2, "answer: ", "as the request has 3 completions")


def test_what_was_found_is_json_too(replayed, model, launched):
    found = json.loads(replayed(launched, model, "--prompt", PROMPT, "--json").stdout)
    assert [finding["agrees"] for finding in found["findings"]] == [True] * 3


def test_another_prompt_is_told_and_not_computed(replayed, model, launched):
    done = replayed(launched, model, "--prompt", PROMPT + "s")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"  prompt  DIFFERS: is another one, of {len(PROMPT) + 1} tokens"


def test_another_answer_is_told_by_exit_code_4(replayed, model, launched, tmp_path):
    content = json.loads(launched.read_text())
    part = content["requests"][0]["completions"][0]
    part["answer"] = part["answer"][:-1] + ("0" if part["answer"][-1] != "0" else "1")
    changed = tmp_path / "run.json"
    changed.write_text(json.dumps(content))
    shutil.copy(nonces_path(launched), nonces_path(changed))
    done = replayed(changed, model, "--prompt", PROMPT)
    assert done.returncode == 4
    assert "  answer  DIFFERS: is another one, of 6 tokens" in done.stdout.splitlines()


@pytest.mark.parametrize("change", [{"seed": 5}, {"temperature": 0.5}, {"stop": "sha256:" + "0" * 64}])
def test_params_that_somebody_has_changed_do_not_give_the_answer(replayed, model, launched, tmp_path, change):
    content = json.loads(launched.read_text())
    content["requests"][0]["params"].update(change)
    changed = tmp_path / "run.json"
    changed.write_text(json.dumps(content))
    shutil.copy(nonces_path(launched), nonces_path(changed))
    assert replayed(changed, model, "--prompt", PROMPT).returncode == (1 if "stop" in change else 4)


def test_another_model_is_refused_by_both_digests(replayed, model, launched, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    edit_config(other, lambda config: config.update(a_field_that_nobody_reads=1))
    expected = json.loads(launched.read_text())["session"]["model_digest"]
    assert_one_line(
        replayed(launched, other, "--prompt", PROMPT), 1, "the model's digest is", f"{expected} is expected"
    )


def test_a_chat_is_laid_out_as_launch_does(replayed, model, tmp_path):
    file = tmp_path / "run.json"
    flags = ["--prompt", "abc", "--chat", "--max-new-tokens", "3"]
    assert run("launch", model, "-q", "--mode", "tee-only", "--evidence", file, *flags).returncode == 0
    assert replayed(file, model, "--prompt", "abc", "--chat").returncode == 0
    assert replayed(file, model, "--prompt", "abc").returncode == 1
    conversation = tmp_path / "messages.json"
    conversation.write_text(json.dumps([{"role": "user", "content": "abc"}]))
    assert replayed(file, model, "--messages", conversation).returncode == 0


def test_a_turn_that_went_on_from_the_cache_of_the_last_one_is_computed_whole(replayed, model, tmp_path):
    file, messages = tmp_path / "run.json", tmp_path / "messages.json"
    params = SamplingParams(max_tokens=8, temperature=1.0, allowed_token_ids=list(range(66, 92)), ignore_eos=True)
    asked, told = [{"role": "user", "content": "abc"}], []
    with LLM(model, mode="tee-only", max_model_len=256, evidence=file) as llm, llm.conversation() as conversation:
        for question in ("and then?", "why?"):
            said = conversation.chat(asked, params)
            told.append((said.receipt, params))
            messages.write_text(json.dumps(asked))
            asked += [{"role": "assistant", "content": said.outputs[0].text}, {"role": "user", "content": question}]
    assert said.num_cached_tokens > 0
    write_nonces(nonces_path(file), told)
    done = replayed(file, model, "--request", 2, "--messages", messages)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def batch(model, tmp_path_factory) -> tuple[Path, list[str]]:
    """What a session has written whose requests ran beside each other, in chunks, with params of every kind."""
    file = tmp_path_factory.mktemp("batch") / "run.json"
    texts = ["a", "of several words", "long " * 30]
    params = [
        SamplingParams(n=3, max_tokens=5, temperature=1.0, ignore_eos=True),
        SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, seed=7, logit_bias={65: 2.0}, bad_words=["q"]),
        SamplingParams(max_tokens=7, temperature=0, allowed_token_ids=list(range(60, 90)), min_tokens=2),
    ]
    with LLM(model, mode="tee-only", max_model_len=256, max_batch_tokens=32, max_num_seqs=4, evidence=file) as llm:
        outputs = llm.generate(texts, params)
        stream = llm.start("cut", SamplingParams(max_tokens=200, temperature=1.0, ignore_eos=True))
        pieces = llm.stream_completion(stream)
        next(pieces)
        pieces.close()
    given = [(output.receipt, each) for output, each in zip(outputs, params, strict=True)]
    write_nonces(nonces_path(file), [*given, (stream.receipt, stream.params)])
    return file, [*texts, "cut"]


def test_what_ran_beside_a_request_is_not_in_its_answer(model, batch):
    file, texts = batch
    with LLM(model, mode="tee-only", max_model_len=256, max_num_seqs=1) as llm:
        for number, text in enumerate(texts, 1):
            findings = compare(
                llm,
                read_request(file, nonces_path(file), number),
                lambda llm, params, text=text: llm.start(text, params),
            )
            assert [finding for finding in findings if not finding.agrees] == [], number
    assert len(findings) == 3


def test_which_of_several_requests_has_to_be_said(replayed, model, batch):
    file, texts = batch
    assert_one_line(replayed(file, model, "--prompt", texts[0]), 2, "request: ", "one of 1, 2, 3, 4")
    assert_one_line(replayed(file, model, "--prompt", "a", "--request", 9), 2, "request: got 9", "1, 2, 3, 4")
    done = replayed(file, model, "--prompt", texts[1], "--request", 2)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("flags", [[], ["--prompt", "a", "--messages", "b"], ["--messages", "b", "--chat"]])
def test_a_prompt_has_to_be_given_in_one_way(replayed, model, launched, flags):
    assert_one_line(replayed(launched, model, *flags), 2, "one of --prompt, --prompt-file and --messages")


def test_a_nonce_of_another_request_opens_nothing(replayed, model, batch, tmp_path):
    file, texts = batch
    opened = json.loads(nonces_path(file).read_text())
    opened["requests"][0]["nonce"], opened["requests"][1]["nonce"] = "00" * 32, opened["requests"][0]["nonce"]
    nonces = tmp_path / "nonces.json"
    nonces.write_text(json.dumps(opened))
    done = replayed(file, model, "--request", 1, "--prompt", texts[0], nonces=nonces)
    assert (done.returncode, done.stdout.splitlines()[-1].split()[:2]) == (1, ["prompt", "DIFFERS:"])
    done = replayed(file, model, "--request", 2, "--prompt", texts[1], nonces=nonces)
    assert (done.returncode, done.stdout.splitlines()[-1].split()[:2]) == (1, ["params", "DIFFERS:"])


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"schema":"tsqp-shm evidence 2"}', '{"schema":"tsqp-shm evidence 1"}',
        '{"schema":"tsqp-shm evidence 1","requests":[1],"session":{}}',
        '{"schema":"tsqp-shm evidence 1","requests":[{"request":1}],"session":{}}',
        '{"schema":"tsqp-shm evidence 1","requests":[{"request":1,"params":{"seed":"x"}}],"session":{}}',
    ],
)  # fmt: skip
def test_what_is_no_evidence_is_one_line(launched, tmp_path, content):
    file = tmp_path / "run.json"
    file.write_text(content)
    with pytest.raises(EvidenceError, match="not "):
        read_request(file, nonces_path(launched), None)


@pytest.mark.parametrize("field", ["prompt", "params", "completions", "answer", "answer_tokens", "max_tokens", "error"])
@pytest.mark.parametrize("value", [None, [], "x", -1, {"a": 1}])
def test_a_record_with_another_thing_in_a_field_is_one_error_or_another_request(launched, tmp_path, field, value):
    content = json.loads(launched.read_text())
    record = content["requests"][0]
    (record if field in record else record["completions"][0])[field] = value
    file = tmp_path / "run.json"
    file.write_text(json.dumps(content))
    with contextlib.suppress(EvidenceError):
        request = read_request(file, nonces_path(launched), None)
        assert field in ("prompt", "answer", "error", "completions")
        assert request.answers == [] or field != "completions"


def test_the_exit_code_tells_another_answer_from_another_request():
    agrees, differs = Finding("params", True, ""), Finding("answer 2", False, "is another one")
    answer = Finding("answer", True, "", token_ids=[1])
    assert exit_code([agrees, answer]) == 0
    assert exit_code([agrees, answer, differs]) == 4
    assert exit_code([Finding("prompt", False, ""), differs]) == 1
    # Where nothing was compared, nothing agrees.
    assert exit_code([agrees]) == 1
    assert exit_code([agrees, answer, Finding("answer 1", False, "", is_compared=False)]) == 1
