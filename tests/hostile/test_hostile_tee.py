"""What a hostile TEE can do to the GPU process: end its session, and not the next one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import hostile_field_tee
import hostile_tee
import pytest
from models import RandomModel, model_folder, random_token_ids
from processes import ForkServer

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import ArenaMismatch, ConfigError, PeerDied, ProtocolError, TsqpError

PROMPT = list(random_token_ids(20))
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
SESSION_NAMES = (f"hostile-tee{os.getpid()}-{number}" for number in itertools.count())
# What the GPU process ends with: well, a fault it did not expect (a token of no vocabulary), or an error of ours.
ORDERLY = (0, 1, ProtocolError.exit_code, PeerDied.exit_code)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer("real_gpu")
    yield server
    server.close()


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


def honest_tokens(server: ForkServer, model: Path, session: str) -> list[int]:
    pid = server.start(str(model), session)
    with LLM(model, start_gpu=False, session=session, timeout_s=30.0, max_model_len=128, tee_threads=1) as llm:
        tokens = llm.generate([PROMPT], PARAMS)[0].outputs[0].token_ids
    assert server.wait(pid) == 0
    return tokens


@pytest.fixture(scope="module")
def expected_tokens(server, model) -> list[int]:
    return honest_tokens(server, model, next(SESSION_NAMES))


@pytest.mark.parametrize("misbehaviour", hostile_tee.MISBEHAVIOURS)
def test_the_gpu_process_ends_in_order_and_serves_the_next_session(
    server, model, forked, expected_tokens, misbehaviour
):
    session = next(SESSION_NAMES)
    pid = server.start(str(model), session)
    forked(hostile_tee.misbehave, model, session, misbehaviour).join()
    # A signal would be negative.
    assert server.wait(pid) in ORDERLY
    assert honest_tokens(server, model, session) == expected_tokens


@pytest.mark.parametrize("misbehaviour", hostile_field_tee.MISBEHAVIOURS)
def test_a_gpu_process_that_multiplies_in_the_field_takes_any_words_and_no_other_record(
    server, model, forked, misbehaviour
):
    session = next(SESSION_NAMES)
    pid = server.start(str(model), session)
    forked(hostile_field_tee.misbehave, model, session, misbehaviour).join()
    is_allowed = misbehaviour in hostile_field_tee.ALLOWED
    assert server.wait(pid) == (0 if is_allowed else ProtocolError.exit_code)


def test_a_gpu_process_of_other_weights_is_none_of_the_session(server, model, forked):
    session = next(SESSION_NAMES)
    pid = server.start(str(model), session)
    forked(hostile_field_tee.invite_other_weights, model, session).join()
    assert server.wait(pid) == ArenaMismatch.exit_code


@pytest.mark.parametrize("invitation", hostile_tee.INVITATIONS)
def test_a_false_invitation_is_refused_in_order(server, model, forked, expected_tokens, invitation):
    session = next(SESSION_NAMES)
    told, tell = os.pipe()
    tee = forked(hostile_tee.invite, model, session, invitation, tell)
    os.read(told, 1)
    pid = server.start(str(model), session)
    assert server.wait(pid) in (TsqpError.exit_code, ConfigError.exit_code)
    tee.kill()
    for end in (told, tell):
        os.close(end)
    # What the dead one published lies there until the next begins, and is taken by nobody.
    assert honest_tokens(server, model, session) == expected_tokens
