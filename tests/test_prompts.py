"""Prompts, params and settings in the forms in which callers have them; anything else is one error that names it."""

from __future__ import annotations

import array
import collections
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import ConfigError, RequestError
from tsqp_shm.prompts import as_prompt, as_prompts, params_of_each

torch = pytest.importorskip("torch")


class OldSequence:
    """A sequence by `__getitem__` alone."""

    def __getitem__(self, index: int) -> int:
        return [5, 6][index]


def forms(prompts) -> list[object]:
    """Texts and token ids of prompts, as Python's own."""
    return [
        (prompt.text, None if prompt.token_ids is None else list(prompt.token_ids)) for prompt in as_prompts(prompts)
    ]


IDS = (None, [5, 6])
A, B = ("a", None), ("b", None)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("a", [A]),
        (np.str_("a"), [A]),
        ("", [("", None)]),
        ("a\0b", [("a\0b", None)]),
        ([5, 6], [IDS]),
        ((5, 6), [IDS]),
        (range(5, 7), [IDS]),
        (iter([5, 6]), [IDS]),
        (collections.deque([5, 6]), [IDS]),
        (array.array("H", [5, 6]), [IDS]),
        (OldSequence(), [IDS]),
        *((np.array([5, 6], kind), [IDS]) for kind in "bBhHiIlLqQ"),
        (np.array([5, 6], object), [IDS]),
        (torch.tensor([5, 6]), [IDS]),
        (torch.tensor([5, 6], dtype=torch.int16), [IDS]),
        ([np.int64(5), np.uint8(6)], [(None, [np.int64(5), np.uint8(6)])]),
        ([], []),
        ((), []),
        (iter([]), []),
        (np.array([]), []),
        (["a", "b"], [A, B]),
        (("a", "b"), [A, B]),
        ((text for text in "ab"), [A, B]),
        (np.array(["a", "b"]), [A, B]),
        ({"a": 1, "b": 2}.keys(), [A, B]),
        ([[5, 6]], [IDS]),
        ([(5, 6), range(5, 7), np.array([5, 6]), torch.tensor([5, 6]), iter([5, 6])], [IDS] * 5),
        (["a", [5, 6], {"prompt": "b"}], [A, IDS, B]),
        ({"prompt": "a"}, [A]),
        ({"prompt_token_ids": [5, 6]}, [IDS]),
        ({"prompt": "a", "prompt_token_ids": np.array([5, 6])}, [("a", [5, 6])]),
        ({"prompt": "a", "prompt_token_ids": None}, [A]),
        ({"prompt": None, "prompt_token_ids": (5, 6)}, [IDS]),
        (collections.UserDict(prompt="a"), [A]),
        ([[]], [(None, [])]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_flat_sequence_of_numbers_is_one_prompt_and_any_other_is_several(given, meant):
    assert forms(given) == meant
    for text, _ in forms(given) if not isinstance(given, collections.abc.Iterator) else ():
        assert text is None or type(text) is str


def test_a_torch_tensor_that_is_iterated_is_one_prompt():
    (prompt,) = as_prompts(iter(torch.tensor([5, 6])))
    assert [int(token_id) for token_id in prompt.token_ids] == [5, 6]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, r"prompts: got None \(NoneType\), expected a string, token ids"),
        (5, r"prompts: got 5 \(int\)"),
        (1.5, r"prompts: got 1.5 \(float\)"),
        (True, r"prompts: got True \(bool\)"),
        (b"ab", "prompts: got a bytes of 2"),
        (bytearray(b"ab"), "prompts: got a bytearray"),
        (memoryview(b"ab"), "prompts: got a memoryview"),
        ({5, 6}, "prompts: got a set of 2"),
        (object(), "prompts: got an object"),
        (int, "prompts: got a type"),
        (np.array(5), "prompts: got a ndarray.*in one dimension, not in 0"),
        (np.array([[5, 6]]), "prompts: got a ndarray.*in one dimension, not in 2"),
        (torch.tensor([[5, 6]]), "prompts: got a Tensor.*in one dimension, not in 2"),
        (torch.empty(2, device="meta"), "prompts: got a Tensor"),
        (np.array([(5, 6)], [("a", int), ("b", int)]), "prompts: got a ndarray.*without fields"),
        ([None], r"prompts\[0\]: got None \(NoneType\)"),
        (["a", None], r"prompts\[1\]: got None"),
        (["a", 5], r"prompts\[1\]: got 5 \(int\)"),
        (["a", b"b"], r"prompts\[1\]: got a bytes of 1"),
        (["a", np.array([[5, 6]])], r"prompts\[1\]: got a ndarray"),
        (["a", {5}], r"prompts\[1\]: got a set of 1"),
        (["a", "\ud800"], r"prompts\[1\]: got '1 characters', expected text that UTF-8 can encode"),
        ("\ud800", "prompt: got"),
        ({}, "prompt: got a dict of 0, expected prompt or prompt_token_ids"),
        ({"prompt": "a", "multi_modal_data": None}, r"prompt\['multi_modal_data'\]: got None, expected no such key"),
        (["a", {"prompt": "a", "x": 1}], r"prompts\[1\]\['x'\]: got 1, expected no such key"),
        ({"input_ids": [5]}, r"prompt\['input_ids'\]"),
        ({5: "a"}, r"prompt\[5\]"),
        ({"prompt": [5]}, r"prompt\['prompt'\]: got \[5\] \(list\), expected a string"),
        ({"prompt_token_ids": "a"}, r"prompt\['prompt_token_ids'\]: got 'a' \(str\), expected token ids"),
        ({"prompt_token_ids": 5}, r"prompt\['prompt_token_ids'\]: got 5 \(int\)"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_anything_else_is_named_with_its_type_and_place(given, said):
    with pytest.raises(RequestError, match=said) as caught:
        as_prompts(given)
    assert "\n" not in str(caught.value)


def test_one_prompt_is_not_several():
    assert as_prompt("a").text == "a"
    assert list(as_prompt([5, 6]).token_ids) == [5, 6]
    # Its items are looked at as token ids.
    assert list(as_prompt(["a"]).token_ids) == ["a"]


def test_params_are_for_all_or_for_each():
    one, other = SamplingParams(seed=1), SamplingParams(seed=2)
    assert params_of_each(one, 2) == [one, one]
    assert params_of_each([one, other], 2) == [one, other]
    assert params_of_each(iter((one, other)), 2) == [one, other]
    assert params_of_each([], 0) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_tokens": 2}, "sampling_params: got a dict of 1, expected a SamplingParams"),
        (5, r"sampling_params: got 5 \(int\)"),
        ("a", r"sampling_params: got 'a' \(str\)"),
        (SamplingParams, "sampling_params: got a type"),
        ([SamplingParams(), {}], r"sampling_params\[1\]: got a dict of 0"),
        ([SamplingParams(), None], r"sampling_params\[1\]: got None"),
        ([SamplingParams()], "got a list of 1, expected one for each of the 2 prompts"),
        ([SamplingParams()] * 3, "got a list of 3, expected one for each of the 2 prompts"),
    ],
    ids=str,
)
def test_wrong_params_are_named(given, said):
    with pytest.raises(RequestError, match=said):
        params_of_each(given, 2)


@pytest.mark.parametrize(
    ("field", "given", "meant"),
    [
        ("max_num_seqs", np.int64(4), 4),
        ("max_model_len", np.array(64), 64),
        ("timeout_s", np.float32(2), 2.0),
        ("timeout_s", 2, 2.0),
        ("check_finite", np.True_, True),
        ("dtype", np.str_("float32"), "float32"),
        ("session", "mine", "mine"),
    ],
)
def test_settings_may_be_numbers_of_any_library(field, given, meant):
    value = getattr(EngineConfig(**{field: given}), field)
    assert value == meant
    assert type(value) is type(meant)


WRONG_TYPES = {"str": 5, "int": "4", "float": "4", "bool": 1}


@pytest.mark.parametrize("field", EngineConfig.__dataclass_fields__.values(), ids=lambda field: field.name)
def test_a_setting_of_another_type_is_named_with_its_type(field):
    # Of a stock of pads a number says how many rows.
    wrong = 1.5 if field.name == "pad_stock" else WRONG_TYPES[str(field.type).partition(" ")[0]]
    for value in (wrong, [1], Path("x"), b"x", object(), 1j):
        with pytest.raises(ConfigError) as caught:
            LLM("nowhere", **{field.name: value})
        assert (caught.value.field, type(value).__name__ in str(caught.value)) == (field.name, True)
        assert pickle.loads(pickle.dumps(caught.value)).value == caught.value.value


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_parallel_size": 1}, "tensor_parallel_size: got 1, expected none of this name"),
        ({"gpu_memory_utilization": 0.9}, "gpu_memory_utilization: got 0.9, .*near it: .*gpu"),
        ({"trust_remote_code": False}, "trust_remote_code: got False"),
        ({"enforce_eager": True}, "enforce_eager: got True"),
        ({"seed": 0}, r"seed: got 0, expected SamplingParams\(seed=...\), as it is called here"),
        ({"temperature": 0.5}, r"temperature: got 0.5, expected SamplingParams\(temperature=...\)"),
        ({"max_num_batched_tokens": 10}, "max_num_batched_tokens: got 10, expected max_batch_tokens, as it is called"),
        ({"max_model_length": 10}, "max_model_length: got 10, .*near it: max_model_len"),
        ({"timeout": 3}, "timeout: got 3, expected timeout_s"),
        ({"dtype": "auto"}, "dtype: got 'auto', expected bfloat16 or float32"),
        ({"dtype": torch.float32}, "dtype: got a dtype, expected bfloat16 or float32"),
        ({"quantization": None}, "quantization: got None"),
        ({"config": {"dtype": "float32"}}, "config: got a dict of 1, expected an EngineConfig"),
        ({"trace": 5}, r"trace: got 5 \(int\)"),
        ({"report": 5}, r"report: got 5 \(int\)"),
        ({"start_gpu": "yes"}, r"start_gpu: got 'yes' \(str\)"),
        ({"transport": 5}, r"transport: got 5 \(int\)"),
        ({"revision": 5}, r"revision: got 5 \(int\)"),
        ({"config": EngineConfig(), "dtype": None}, "dtype: got None"),
    ],
    ids=str,
)
def test_an_argument_of_the_llm_that_there_is_not_is_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        LLM(**{"model": "nowhere", **settings})


def test_an_endless_prompt_is_read_no_further_than_it_may_be_long():
    (prompt,) = as_prompts(itertools.count(5))
    assert list(itertools.islice(prompt.token_ids, 3)) == [5, 6, 7]
