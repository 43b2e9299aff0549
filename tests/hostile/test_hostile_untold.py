"""A false product is told of, whatever else happens: a deadline that passes meanwhile, a disk that is full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from field_sessions import against, ask
from hostile_field import misbehaviour
from hostile_gpu import FAULT_STEP, HostileGpu
from models import RandomModel, model_folder, random_token_ids

from tsqp_shm import SamplingParams
from tsqp_shm.errors import EvidenceError, IntegrityError
from tsqp_shm.shm.protocol import Record
from tsqp_shm.tee.transcript import Transcript

PROMPT = list(random_token_ids(9))
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


def lie_and_fall_silent():
    moment, lie = misbehaviour("plus-one:qkv")

    def misbehave(gpu: HostileGpu, record: Record) -> None:
        lie(gpu, record)
        gpu.until_the_tee_ends()

    return moment, misbehave


def test_who_lies_and_lets_the_deadline_pass_is_told_of_at_the_end(model):
    with pytest.raises(IntegrityError, match="qkv of layer 0"), against(model, lie_and_fall_silent()) as (llm, _):
        (told,) = ask(llm, [PROMPT], replace(PARAMS, deadline_s=1.0))
        assert told[-1].completion.finish_reason == "deadline"
        assert len(told[-1].completion.token_ids) == FAULT_STEP - 1


def test_a_session_whose_caller_was_told_closes_in_peace(model):
    with against(model, misbehaviour("plus-one:qkv")) as (llm, _):
        (told,) = ask(llm, [PROMPT], PARAMS)
        assert type(told[-1].error) is IntegrityError


def test_a_transcript_that_cannot_be_written_hides_nothing(model, tmp_path, monkeypatch):
    add, products = Transcript.add, iter(range(10_000))

    def fill_up(transcript, *product):
        # The disk is full from the false product on: four Linears in each of two layers, and lm_head.
        if next(products) >= (FAULT_STEP - 1) * 9:
            raise EvidenceError(tmp_path, "cannot be written: No space left on device")
        add(transcript, *product)

    monkeypatch.setattr(Transcript, "add", fill_up)
    with against(model, misbehaviour("plus-one:qkv"), transcript=tmp_path / "run.tr") as (llm, _):
        (told,) = ask(llm, [PROMPT], PARAMS)
        assert type(told[-1].error) is IntegrityError
