"""What a GPU process can do to the pads of mode `blinded`: use up those of the pass in which it dies, and no more."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from field_sessions import against, ask, tokens_of
from hostile_field import misbehaviour
from models import RandomModel, model_folder, random_token_ids
from test_hostile_deferral import LastWill

from tsqp_shm import LLM, SamplingParams

PARAMS = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)
PROMPTS = [list(random_token_ids(270, seed=270))]
LIMITS = {"max_model_len": 320, "max_num_seqs": 1, "max_batch_tokens": 320, "block_rows": 128}


@pytest.fixture
def nothing_is_collected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_there_is_room_for_others_at_once_where_a_pass_was_broken_off(nothing_is_collected):
    """Of a stock that has no row to spare: what was begun with its pads is dropped before a collector comes by."""
    model: Path = model_folder(RandomModel("llama"))
    with LLM(model, mode="tee-only", **LIMITS) as llm:
        expected = [tokens_of(mine) for mine in ask(llm, PROMPTS, PARAMS)]
    will = LastWill("true:o:1")
    settings = {"mode": "blinded", "pad_stock": "270", "restart_gpu": 1, "timeout_s": 5.0, **LIMITS}
    with against(model, will.script, misbehaviour("none"), dies=will.dies, **settings) as (llm, _):
        assert [tokens_of(mine) for mine in ask(llm, PROMPTS, PARAMS)] == expected
        assert llm.statistics.gpu_restarts == 1
