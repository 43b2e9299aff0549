"""What a GPU process can do to modes `verified` and `blinded` by false products: end the session, and say nothing to
anybody."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from field_sessions import LIMITS, OVERFLOWING, against, ask, tokens_of, with_one_token_that_overflows
from hostile_field import LAYERS, TAMPERINGS, Asked, misbehaviour
from hostile_gpu import FAULT_STEP
from models import RandomModel, model_folder, random_token_ids

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import IntegrityError, NumericsError

# Two callers share each pass from the second on: the prompt of the first has three blocks.
PROMPTS = [[token for token in random_token_ids(length, seed=length) if token != OVERFLOWING] for length in (270, 9)]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)
NEVER = misbehaviour("none")
MODES = ("verified", "blinded")


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


@cache
def honest_tokens(model: Path) -> list[list[int]]:
    with LLM(model, mode="tee-only", **LIMITS) as llm:
        return [tokens_of(mine) for mine in ask(llm, PROMPTS, PARAMS)]


def layer_of(role: str) -> int | None:
    return None if role == "lm_head" else LAYERS[role]


def end_by_a_false_product(model: Path, tampering: str, role: str, threads: int, mode: str) -> list[Asked]:
    """Both callers have the tokens of the passes before, and an error each that names the Linear; so has who comes
    after."""
    with against(model, misbehaviour(f"{tampering}:{role}"), mode=mode, tee_threads=threads) as (llm, (gpu,)):
        told = ask(llm, PROMPTS, PARAMS)
        for mine, honest in zip(told, honest_tokens(model), strict=True):
            error = mine[-1].error
            assert type(error) is IntegrityError
            assert (error.operation, error.layer, error.exit_code) == (role, layer_of(role), 4)
            assert tokens_of(mine) == honest[: FAULT_STEP - 1]
        assert told[0][-1].error is not told[1][-1].error
        with pytest.raises(IntegrityError, match=str(told[0][-1].error)):
            llm.generate([[1]], PARAMS)
        statistics = llm.statistics
        assert (statistics.steps, statistics.generated) == (FAULT_STEP - 1, 2 * (FAULT_STEP - 1))
    return gpu.gpu.asked


@pytest.mark.parametrize("mode", MODES)
def test_with_true_products_the_tokens_are_those_of_the_tee_alone(model, mode):
    with against(model, NEVER, mode=mode) as (llm, _):
        assert [tokens_of(mine) for mine in ask(llm, PROMPTS, PARAMS)] == honest_tokens(model)


def cases() -> list[pytest.ParameterSet]:
    """All of them in a long run; in every run each class once, over the Linears, threads and modes in turn."""
    roles = list(LAYERS)

    def is_turn(number: int, *case: object) -> bool:
        return case == (roles[number % len(roles)], 1 + number % 2, MODES[number // 2 % 2])

    return [
        pytest.param(tampering, *case, marks=() if is_turn(number, *case) else pytest.mark.long)
        for number, tampering in enumerate(TAMPERINGS)
        for case in product(roles, (1, 2), MODES)
    ]


@pytest.mark.parametrize(("tampering", "role", "threads", "mode"), cases())
def test_a_false_product_is_found_and_no_token_of_its_pass_comes_out(model, tampering, role, threads, mode):
    end_by_a_false_product(model, tampering, role, threads, mode)


# What the GPU process sees of being found out.


def steps_of(asked: list[Asked]) -> dict[int, list[str]]:
    """The submissions of each pass, without what was asked between passes."""
    found: dict[int, list[str]] = {}
    for each in asked:
        if each.rows:
            found.setdefault(each.step, []).append(each.record)
    return found


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> Path:
    return with_one_token_that_overflows(RandomModel("llama").write(tmp_path_factory.mktemp("overflowing") / "model"))


@pytest.fixture(scope="module")
def asked_of_an_honest_one(overflowing) -> list[Asked]:
    with against(overflowing, NEVER) as (llm, (gpu,)):
        assert all(update.error is None for mine in ask(llm, PROMPTS, PARAMS) for update in mine)
    assert not any(any(each.is_zero) for each in gpu.gpu.asked)
    return gpu.gpu.asked


@pytest.mark.parametrize(
    ("name", "step", "mode", "overflows"),
    [
        ("huge:gate_up", 1, "verified", True),
        ("huge:gate_up", FAULT_STEP, "verified", True),
        ("huge:gate_up", FAULT_STEP, "blinded", False),
        ("plus-one:qkv", 1, "verified", False),
        pytest.param("word-of-ones:o", FAULT_STEP, "verified", False, marks=pytest.mark.long),
        pytest.param("word-of-ones:o", FAULT_STEP, "blinded", False, marks=pytest.mark.long),
    ],
)
def test_a_pass_with_a_false_product_makes_the_submissions_of_an_honest_one(
    overflowing, asked_of_an_honest_one, name, step, mode, overflows
):
    """Also where the false product is legal, and so large that later rows are no numbers; they are those of the other
    mode too."""
    with against(overflowing, misbehaviour(f"{name}:{step}"), mode=mode) as (llm, (cheat,)):
        assert all(type(mine[-1].error) is IntegrityError for mine in ask(llm, PROMPTS, PARAMS))
    expected, seen = steps_of(asked_of_an_honest_one), steps_of(cheat.gpu.asked)
    # As many passes, each with the same submissions in the same order, byte for byte but for the epoch.
    assert seen == {number: records for number, records in expected.items() if number <= step}
    assert cheat.gpu.asked[-1].record == expected[step][-1]
    # A row that is no number crosses as zeros, or as its pad.
    assert any(any(each.is_zero) for each in cheat.gpu.asked) == overflows


# Numbers that are none.

GOOD, BAD = PROMPTS[1], [3, OVERFLOWING, 5, 6]


@pytest.mark.parametrize("scores", [{}, {"logprobs": 1, "prompt_logprobs": 0}], ids=str)
def test_a_request_whose_numbers_are_none_ends_alone(overflowing, scores):
    params = replace(PARAMS, **scores)
    with LLM(overflowing, mode="tee-only", **LIMITS) as llm:
        expected = [tokens_of(mine) for mine in ask(llm, [GOOD, BAD, GOOD], params)]
    with against(overflowing, NEVER) as (llm, (gpu,)):
        good, bad, beside = ask(llm, [GOOD, BAD, GOOD], params)
        assert [tokens_of(mine) for mine in (good, bad, beside)] == expected
        assert type(bad[-1].error) is NumericsError
        assert good[-1].error is beside[-1].error is None
        assert tokens_of(good) == tokens_of(beside) != []
        assert tokens_of(ask(llm, [GOOD], params)[0]) == tokens_of(good)
    assert any(any(each.is_zero) for each in gpu.gpu.asked)


def test_where_a_product_of_the_same_pass_is_false_it_is_everybodys_end(overflowing):
    with against(overflowing, misbehaviour("plus-one:down:1")) as (llm, _):
        told = ask(llm, [GOOD, BAD, GOOD], PARAMS)
        assert [(type(mine[-1].error), tokens_of(mine)) for mine in told] == [(IntegrityError, [])] * 3
