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
        ("n", np.int64(3), 3),
        ("presence_penalty", -2, -2.0),
        ("frequency_penalty", np.float32(0.5), 0.5),
        ("min_p", 1, 1.0),
        ("min_tokens", np.int8(3), 3),
        ("logprobs", None, None),
        ("logprobs", 0, 0),
        ("logprobs", -1, -1),
        ("logprobs", True, 1),
        ("prompt_logprobs", np.int64(5), 5),
        ("prompt_logprobs", True, 1),
        ("detokenize", np.False_, False),
        ("skip_special_tokens", False, False),
        ("include_stop_str_in_output", True, True),
        ("stop_token_ids", None, ()),
        ("stop_token_ids", [3, np.int64(1), 3], (3, 1)),
        ("stop_token_ids", np.array([2, 1]), (2, 1)),
        ("bad_words", None, ()),
        ("bad_words", ["a", "b", "a"], ("a", "b")),
        ("logit_bias", None, ()),
        ("logit_bias", {5: 1, np.int64(7): np.float32(-0.5), "9": -100}, ((5, 1.0), (7, -0.5), (9, -100.0))),
        ("logit_bias", [(5, 1.0)], ((5, 1.0),)),
        ("allowed_token_ids", None, None),
        ("allowed_token_ids", range(3), (0, 1, 2)),
    ],
    ids=described,
)
def test_a_value_means_what_it_means_in_vllm(field, given, meant):
    value = getattr(SamplingParams(**{"max_tokens": 20, field: given}), field)
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
        ("seed", 2**64, "got 18446744073709551616, expected a whole number, 0 to 2\\^64 - 1"),
        ("n", 0, "got 0, expected a whole number, 1 to 16,384"),
        ("n", 16_385, "got 16385"),
        ("presence_penalty", 2.1, "got 2.1, expected a number, -2 to 2"),
        ("frequency_penalty", math.nan, "got nan"),
        ("min_p", -0.1, "got -0.1"),
        ("min_p", 1.1, "got 1.1"),
        ("min_tokens", -1, "got -1"),
        ("min_tokens", 17, "got 17, expected at most max_tokens, which is 16"),
        ("logprobs", -2, "got -2"),
        ("logprobs", "all", r"got 'all' \(str\)"),
        ("logprobs", False, r"got False \(bool\)"),
        ("prompt_logprobs", 1.0, r"got 1.0 \(float\)"),
        ("detokenize", 0, r"got 0 \(int\)"),
        ("stop_token_ids", 5, r"got 5 \(int\)"),
        ("stop_token_ids", "5", r"got '5' \(str\)"),
        ("stop_token_ids", [1, "2"], r"stop_token_ids\[1\]: got '2' \(str\)"),
        ("stop_token_ids", [-1], r"stop_token_ids\[0\]: got -1"),
        ("bad_words", "word", r"got 'word' \(str\)"),
        ("bad_words", [""], r"bad_words\[0\]: got ''"),
        ("logit_bias", {1: math.inf}, r"logit_bias\[1\]: got inf"),
        ("logit_bias", {1: None}, r"logit_bias\[1\]: got None"),
        ("logit_bias", {"a": 1.0}, r"logit_bias: token: got 'a' \(str\)"),
        ("logit_bias", {-1: 1.0}, "logit_bias: token: got -1"),
        ("logit_bias", [1, 2], r"got 1 \(int\)"),
        ("logit_bias", 5, r"got 5 \(int\)"),
        ("allowed_token_ids", [], r"allowed_token_ids: got \[\], expected token ids, one at least"),
        ("allowed_token_ids", [1.0], r"allowed_token_ids\[0\]: got 1.0 \(float\)"),
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
        (
            {"structured_outputs": None},
            "structured_outputs: got None, expected none of this name: no grammar is followed",
        ),
        ({"best_of": 2}, "best_of: got 2, expected none of this name: .* `n`"),
        ({"output_kind": 0}, "output_kind: got 0, expected none of this name: `generate` gives what is complete"),
        ({"max_new_tokens": 5}, "max_new_tokens: got 5, expected max_tokens, as it is called here"),
        ({"num_return_sequences": 2}, "num_return_sequences: got 2, expected n, as it is called here"),
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


def test_defaults_are_those_of_vllm():
    """As its 0.32.0 has them, with its lists as tuples."""
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "bad_words": (),
        "logit_bias": (),
        "allowed_token_ids": None,
        "deadline_s": None,
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n": 2, "temperature": 0}, "n: got 2, expected 1 where temperature is 0"),
        ({"stop": "a", "detokenize": False}, r"stop: got \('a',\), expected no stop strings where detokenize is False"),
    ],
)
def test_values_that_cannot_go_together_are_named(given, said):
    with pytest.raises(ConfigError, match=said):
        SamplingParams(**given)


def test_params_are_values():
    asked = {"logit_bias": {3: 1.5}, "stop_token_ids": [2], "bad_words": ["a"], "allowed_token_ids": [3, 2]}
    params = SamplingParams(max_tokens=None, temperature=1, stop=["a", "b"], seed=np.int64(3), **asked)
    same = SamplingParams(max_tokens=None, temperature=np.float64(1), stop=("a", "b"), seed=3, **asked)
    assert params == same
    assert hash(params) == hash(same)
    assert params != dataclasses.replace(params, seed=4)
    for way in (copy.copy, copy.deepcopy, pickled, dataclasses.replace):
        assert way(params) == params
    assert eval(repr(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 5  # type: ignore[misc]
