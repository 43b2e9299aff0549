"""What a GPU process can do to mode `blinded`: what it can do to `verified`, and use up the pads of the pass in which
it dies."""

from __future__ import annotations

import gc
from functools import cache
from pathlib import Path

import pytest
from field_sessions import against, ask, tokens_of
from hostile_field import misbehaviour
from hostile_gpu import FAULT_STEP, FIELDS
from models import RandomModel, model_folder, random_token_ids
from test_hostile_deferral import LastWill

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import IntegrityError, PeerDied, ProtocolError

LAST = 6
PARAMS = SamplingParams(max_tokens=LAST, ignore_eos=True, temperature=0)
PROMPTS = [list(random_token_ids(length, seed=length)) for length in (270, 9)]
NEVER = misbehaviour("none")
ONE_AT_A_TIME = {"max_model_len": 320, "max_num_seqs": 1, "max_batch_tokens": 320, "block_rows": 128}


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


@cache
def honest_tokens(model: Path) -> list[list[int]]:
    with LLM(model, mode="tee-only", max_model_len=320) as llm:
        return [tokens_of(mine) for mine in ask(llm, PROMPTS, PARAMS)]


def long(*names: str) -> list[pytest.ParameterSet]:
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.parametrize("role", ["lm_head", *long("qkv", "o", "gate_up", "down")])
def test_one_that_cheats_only_in_the_last_pass_has_nothing_of_it_come_out(model, role):
    with against(model, misbehaviour(f"plus-one:{role}:{LAST}"), mode="blinded") as (llm, (gpu,)):
        told = ask(llm, PROMPTS, PARAMS)
        assert [type(mine[-1].error) for mine in told] == [IntegrityError] * 2
        assert [tokens_of(mine) for mine in told] == [tokens[: LAST - 1] for tokens in honest_tokens(model)]
        assert (llm.statistics.steps, llm.statistics.generated) == (LAST - 1, 2 * (LAST - 1))
    seen = [each.progress for each in gpu.gpu.asked if each.step == LAST] + [gpu.left]
    assert {(each.steps, each.generated) for each in seen} == {(LAST - 1, 2 * (LAST - 1))}


@pytest.mark.parametrize("name", ["word-p:down", *long("plus-one:o", "plus-one:lm_head")])
def test_the_last_product_of_one_that_died_is_checked_and_no_other_is_let_in(model, name):
    will = LastWill(name)
    with against(model, will.script, NEVER, dies=will.dies, restart_gpu=1, mode="blinded") as (llm, started):
        told = ask(llm, PROMPTS, PARAMS)
        assert [type(mine[-1].error) for mine in told] == [IntegrityError] * 2
        assert [tokens_of(mine) for mine in told] == [tokens[: FAULT_STEP - 1] for tokens in honest_tokens(model)]
        assert (len(started), llm.statistics.gpu_restarts) == (1, 0)


@pytest.mark.parametrize("name", ["twice", *long("failed", "rejected", *(f"wrong-{field}" for field in FIELDS))])
def test_an_answer_in_another_form_ends_the_session_and_no_token_of_its_pass_comes_out(model, name):
    with against(model, misbehaviour(name), mode="blinded") as (llm, _):
        told = ask(llm, PROMPTS, PARAMS)
        assert [type(mine[-1].error) for mine in told] == [PeerDied if name == "failed" else ProtocolError] * 2
        assert [tokens_of(mine) for mine in told] == [tokens[: FAULT_STEP - 1] for tokens in honest_tokens(model)]


@pytest.fixture
def nothing_is_collected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("step", [1, *long("4")])
def test_one_that_dies_costs_the_pads_of_its_pass_and_there_is_room_for_others_at_once(
    model, nothing_is_collected, step
):
    """Of a stock that has no row to spare: what was begun with its pads is dropped before a collector comes by."""
    will = LastWill(f"true:o:{step}")
    settings = {"pad_stock": "270", "restart_gpu": 1, "timeout_s": 5.0, **ONE_AT_A_TIME}
    with against(model, will.script, NEVER, dies=will.dies, mode="blinded", **settings) as (llm, _):
        assert [tokens_of(mine) for mine in ask(llm, PROMPTS[:1], PARAMS)] == honest_tokens(model)[:1]
        assert llm.statistics.gpu_restarts == 1
