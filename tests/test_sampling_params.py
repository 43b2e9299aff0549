"""Sampling params: vLLM's values of every kind of number mean what they mean there, and anything else is named."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

from tsqp_shm import SamplingParams
from tsqp_shm.errors import ConfigError, described


class Two(enum.IntEnum):
    TWO = 2


class Tensor:
    """As torch's of no dimensions: read by `item`, and a number of no kind that Python knows."""

    shape = ()

    def __init__(self, value: object) -> None:
        self._value = value

    def item(self) -> object:
        return self._value


class Hostile:
    """Whatever can be asked of it raises."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)

    def __index__(self) -> int:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("field", "given", "meant"),
    [
        ("top_k", -1, 0),
        ("top_k", np.int64(-1), 0),
        ("top_k", 0, 0),
        ("top_k", 10**30, 10**30),
        ("seed", -1, None),
        ("seed", None, None),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("seed", 0, 0),
        ("max_tokens", None, None),
        ("max_tokens", np.int32(4), 4),
        ("max_tokens", np.array(4), 4),
        ("max_tokens", Tensor(4), 4),
        ("max_tokens", Two.TWO, 2),
        ("max_tokens", 10**400, 10**400),
        ("temperature", 1, 1.0),
        ("temperature", np.float16(0.5), 0.5),
        ("temperature", np.array(0.5, np.float32), 0.5),
        ("temperature", Tensor(0.5), 0.5),
        ("temperature", Fraction(1, 2), 0.5),
        ("temperature", np.longdouble(0.5), 0.5),
        ("temperature", -0.0, 0.0),
        ("top_p", 1, 1.0),
        ("repetition_penalty", np.int8(2), 2.0),
        ("deadline_s", 3, 3.0),
        ("ignore_eos", np.True_, True),
        ("stop", None, ()),
        ("stop", "a", ("a",)),
        ("stop", ["a", np.str_("b")], ("a", "b")),
        ("stop", (word for word in "ab"), ("a", "b")),
        ("stop", np.array(["a", "b"]), ("a", "b")),
        ("stop", np.array("a"), ("a",)),
        ("stop", [], ()),
    ],
    ids=described,
)
def test_a_value_means_what_it_means_in_vllm(field, given, meant):
    value = getattr(SamplingParams(**{field: given}), field)
    assert value == meant
    assert type(value) is type(meant)
    if field == "stop":
        assert all(type(text) is str for text in value)


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ("max_tokens", 0, "got 0, expected a whole number, 1 or more, or None"),
        ("max_tokens", 1.5, r"got 1.5 \(float\)"),
        ("max_tokens", 4.0, r"got 4.0 \(float\)"),
        ("max_tokens", True, r"got True \(bool\)"),
        ("max_tokens", np.False_, "got a bool"),
        ("max_tokens", "4", r"got '4' \(str\), expected a whole number"),
        ("max_tokens", b"4", "got a bytes of 1"),
        ("max_tokens", [4], r"got \[4\] \(list\)"),
        ("max_tokens", np.array([4, 5]), "got a ndarray"),
        ("max_tokens", Tensor(True), "got a Tensor"),
        ("max_tokens", -(10**5000), "got an int of 16610 bits"),
        ("max_tokens", Hostile(), "got a Hostile"),
        ("temperature", Hostile(), "got a Hostile"),
        ("temperature", -0.1, "got -0.1, expected a number, 0 or more"),
        ("temperature", math.nan, "got nan"),
        ("temperature", math.inf, "got inf"),
        ("temperature", np.float32("nan"), "got nan"),
        ("temperature", 10**400, "got inf"),
        ("temperature", "hot", r"got 'hot' \(str\), expected a number"),
        ("temperature", None, r"got None \(NoneType\)"),
        ("temperature", 1j, "got a complex"),
        ("temperature", np.complex64(1), "got a complex"),
        ("top_k", -2, "got -2"),
        ("top_k", None, r"got None \(NoneType\)"),
        ("top_p", 0.0, "got 0.0"),
        ("top_p", 1.01, "got 1.01"),
        ("top_p", math.nan, "got nan"),
        ("repetition_penalty", 0, "got 0.0"),
        ("repetition_penalty", math.inf, "got inf"),
        ("seed", -2, "got -2"),
        ("seed", 1.0, r"got 1.0 \(float\)"),
        ("deadline_s", 0, "got 0.0"),
        ("deadline_s", math.inf, "got inf"),
        ("ignore_eos", 1, r"got 1 \(int\), expected True or False"),
        ("ignore_eos", "no", r"got 'no' \(str\)"),
        ("ignore_eos", None, r"got None \(NoneType\)"),
        ("stop", "", "got ''"),
        ("stop", 5, r"got 5 \(int\)"),
        ("stop", b"a", "got a bytes of 1"),
        ("stop", {"a": 1}, "got a dict of 1"),
        ("stop", ["a", ""], "got ''"),
        ("stop", ["a", None], r"stop\[1\]: got None \(NoneType\)"),
        ("stop", ["a", ["b"]], r"got \['b'\] \(list\)"),
    ],
    ids=described,
)
def test_another_value_is_named_with_its_field_and_type(field, given, said):
    with pytest.raises(ConfigError, match=said) as caught:
        SamplingParams(**{field: given})
    assert caught.value.field.startswith(field)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n": 1}, "n: got 1, expected none of this name; there are max_tokens, temperature"),
        ({"presence_penalty": 0.0}, "presence_penalty: got 0.0, expected .* near it: repetition_penalty"),
        ({"logprobs": None}, "logprobs: got None"),
        ({"min_p": 0.1}, "min_p: got 0.1"),
        ({"max_new_tokens": 5}, "max_new_tokens: got 5, expected max_tokens, as it is called here"),
        ({"stop_token_ids": [1]}, "stop_token_ids"),
        ({"temprature": 5}, "temprature: got 5, expected .* near it: temperature"),
    ],
)
def test_an_argument_that_there_is_not_is_named_with_those_near_it(arguments, said):
    with pytest.raises(ConfigError, match=said):
        SamplingParams(**arguments)


def test_arguments_are_given_by_name():
    with pytest.raises(ConfigError, match="by name"):
        SamplingParams(16)  # type: ignore[call-arg]


def pickled(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


def test_params_are_values():
    params = SamplingParams(max_tokens=None, temperature=1, stop=["a", "b"], seed=np.int64(3))
    same = SamplingParams(max_tokens=None, temperature=np.float64(1), stop=("a", "b"), seed=3)
    assert params == same
    assert hash(params) == hash(same)
    assert params != dataclasses.replace(params, seed=4)
    for way in (copy.copy, copy.deepcopy, pickled, dataclasses.replace):
        assert way(params) == params
    assert eval(repr(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 5  # type: ignore[misc]
