"""Transcripts and evidence of which every product is true, and that are those of no honest session, fail."""

from __future__ import annotations

import subprocess
import sys

import pytest
from models import model_folder, random_token_ids
from recorded import (
    CHECKER,
    MODELS,
    Session,
    changed_evidence,
    copied,
    files_in,
    of_kind,
    problems_of,
    recorded,
    records_of,
    words_of,
    written,
)

from tsqp_shm import SamplingParams
from tsqp_shm.tee.caches import Keeper


@pytest.fixture(scope="module")
def original(tmp_path_factory, fast) -> Session:
    return recorded(MODELS[1], tmp_path_factory.mktemp("recorded"), fast)


@pytest.fixture
def session(original, tmp_path) -> Session:
    """A copy, to be changed."""
    return copied(original, tmp_path)


@pytest.mark.parametrize("place", [0, 1, 7, 8], ids=["qkv", "o", "down", "lm_head"])
def test_rows_that_lie_at_another_place_than_they_had_fail(session, place):
    """A product of a pass is true, and stands where another one should."""
    head, records = records_of(session)
    at = next(at for at, record in enumerate(records) if tuple(record[:2]) == (2, place))
    records[at][2] += 12345
    (problem,) = written(session, head, records)
    assert problem.endswith("not every row went through every Linear once")


def test_a_product_that_is_there_twice_fails(session):
    head, records = records_of(session)
    at = of_kind(records, 2)
    records.insert(at, records[at])
    (problem,) = written(session, head, records)
    assert problem == "pass 1: not every row went through every Linear once"


def test_a_false_product_after_which_the_session_has_gone_on_fails(session):
    """A pass that did not end and in which a product was false, and behind it all that was."""
    head, records = records_of(session)
    false = records[of_kind(records, 2)].copy()
    false[-1] ^= 1
    with changed_evidence(session) as evidence:
        evidence["session"]["failures"] = [{"error": "IntegrityError", "layer": 0, "operation": "qkv"}]
    assert written(session, head, [records[0], false, *records]) == ["pass 1: a product is false: qkv, layer 0"]


def test_a_false_product_that_is_told_and_not_there_fails(session):
    with changed_evidence(session) as evidence:
        evidence["session"]["failures"] = [{"error": "IntegrityError", "layer": 0, "operation": "qkv"}]
    assert problems_of(session) == ["the evidence tells of a false product, and the transcript has none"]


@pytest.mark.parametrize("kind", [2, 3], ids=["a product", "an end"])
@pytest.mark.parametrize("place", ["before all", "behind the last"])
def test_a_record_that_belongs_to_no_pass_is_damage(session, kind, place):
    head, records = records_of(session)
    records.insert(0 if place == "before all" else len(records), records[of_kind(records, kind)])
    (problem,) = written(session, head, records)
    assert problem.startswith("the transcript is damaged: word ")
    assert problem.endswith("begins a record that belongs to no pass")


@pytest.mark.parametrize("linear", [9, 2**32 - 1])
def test_a_linear_that_there_is_not_is_damage(session, linear):
    head, records = records_of(session)
    records[of_kind(records, 2)][1] = linear
    assert "the transcript is damaged" in written(session, head, records)[0]


def test_a_pass_that_broke_off_and_was_computed_again_agrees(session):
    head, records = records_of(session)
    end = of_kind(records, 3)
    assert written(session, head, [*records[: end - 1], *records]) == []
    # It began where the one after it begins.
    records.insert(0, records[0].copy())
    records[0][4] += 1
    (problem,) = written(session, head, records)
    assert problem.startswith("pass 1: request 1, completion 0 is at another position")


def test_a_completion_whose_tokens_lie_elsewhere_fails(session):
    head, records = records_of(session)
    second = of_kind(records, 1, first=1)
    records[second][4] += 1
    assert any("at another position" in problem for problem in written(session, head, records))


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", "plain"), ("field", 7), ("vectors", 0), ("model_digest", "sha256:" + "0" * 64), ("linears_digest", "")],
)
def test_evidence_of_another_kind_of_session_fails(session, name, value):
    with changed_evidence(session) as evidence:
        evidence["session"][name] = value
    (problem,) = problems_of(session)
    assert problem.startswith(f"{name} of the evidence is {value}, and not ")


@pytest.mark.parametrize(("name", "value"), [("prompt_tokens", 5000), ("answer_tokens", 1000), ("max_tokens", 9)])
@pytest.mark.parametrize("request_at", [0, 2])
def test_lengths_that_the_rows_do_not_bear_out_fail(session, request_at, name, value):
    with changed_evidence(session) as evidence:
        record = evidence["requests"][request_at]
        (record if name in record else record["completions"][0])[name] = value
    said = f"request {request_at + 1}, completion 0: such a prompt with such an answer has other rows"
    assert problems_of(session)[0] == said


def test_completions_that_are_there_twice_or_not_at_all_fail(session):
    with changed_evidence(session) as evidence:
        evidence["requests"][2]["completions"].append(evidence["requests"][2]["completions"][0])
        evidence["requests"].append(evidence["requests"][0])
    said = ["request 3: its completions are not those that were asked for", "two requests have one number"]
    assert problems_of(session) == said


def test_an_empty_session_does_not_agree(session):
    head, _ = words_of(session)
    session.transcript.write_bytes(head)
    with changed_evidence(session) as evidence:
        evidence["requests"] = []
    assert problems_of(session) == ["there was nothing to check: the transcript has no product"]
    session.evidence.write_text("{}")
    done = subprocess.run([sys.executable, CHECKER, *session], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("this is no evidence")


@pytest.fixture(scope="module")
def followed(tmp_path_factory, fast) -> Session:
    """A request, another one, and one that goes on from the first one's cache: 3 tokens, and 3 of its answer's 4."""
    files, keeper = files_in(tmp_path_factory.mktemp("followed")), Keeper()
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    prompt = list(random_token_ids(3))
    with fast.llm(model_folder(MODELS[1]), mode="verified", max_model_len=64, **files) as llm:
        for is_followed in (True, False, True):
            completion = llm.start(prompt, params)
            completion.keeper = keeper if is_followed else None
            list(llm.stream_completion(completion))
            if is_followed:
                prompt = [*completion.prompt_token_ids, *completion.token_ids, 5, 6]
    return Session(model_folder(MODELS[1]), **files)


@pytest.fixture
def follower(followed, tmp_path) -> Session:
    """A copy, to be changed."""
    return copied(followed, tmp_path)


def test_a_request_that_goes_on_from_an_earlier_one_s_cache_agrees(follower):
    assert problems_of(follower) == []
    with changed_evidence(follower) as evidence:
        part = evidence["requests"][2]["completions"][0]
        assert (part["cached_tokens"], part["cached_from"], part["rows"]) == (6, 1, 3 + 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"cached_tokens": 5},
        {"cached_tokens": 7},
        {"cached_tokens": 0},
        {"cached_tokens": -6},
        {"cached_from": 3},
        {"cached_from": 9},
        {"cached_from": None},
    ],
    ids=str,
)
def test_a_cache_that_held_something_else_fails(follower, fields):
    with changed_evidence(follower) as evidence:
        evidence["requests"][2]["completions"][0].update(fields)
    assert problems_of(follower)


def test_tokens_that_no_request_has_put_into_a_cache_fail(follower):
    """They were never computed: evidence and positions agree with each other."""
    head, records = records_of(follower)
    for record in records:
        if record[0] == 1 and record[2] == 3:
            record[4] += 4
    with changed_evidence(follower) as evidence:
        record = evidence["requests"][2]
        record["prompt_tokens"] += 4
        record["completions"][0]["cached_tokens"] += 4
    (problem,) = written(follower, head, records)
    assert problem.endswith("request 3 goes on from what no cache held")
