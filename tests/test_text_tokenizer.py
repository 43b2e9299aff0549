"""The tokenizer that `LLM.get_tokenizer` gives: transformers' answers, without transformers, or one error.

`tests/test_model_tokens.py` asks the same of folders that name their tokens in every way.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from demo_tokenizers import ours, theirs
from small_tokenizers import byte_level
from tokenizer_habits import habits

from tsqp_shm.errors import ModelFileError, RequestError
from tsqp_shm.model.added_tokens import TokenizerConfig
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.text_tokenizer import TextTokenizer

pytestmark = pytest.mark.usefixtures("demo_tokenizers")
TEXTS = ["Hello, world!", "", "  two\n\nlines ", "Grüße 🙂 東京", "<|im_start|>user\nHi<|im_end|>", "a " * 50]
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello the"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(ours(), theirs().name_or_path)


def test_it_answers_as_that_of_transformers(tokenizer):
    assert habits(tokenizer, TEXTS) == habits(theirs(), TEXTS)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tokenize": False},
        {"return_dict": False},
        {"tokenize": False, "add_generation_prompt": True},
        {"return_dict": False, "add_generation_prompt": True, "tools": None, "padding": False},
        {"tokenize": False, "enable_thinking": False},
    ],
)
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER, ASSISTANT, USER],
        ([USER, ASSISTANT],),
        [[USER], [SYSTEM, USER]],
        [{**USER, "name": None, "tool_calls": None}],
    ],
)
def test_a_chat_template_gives_what_transformers_gives(tokenizer, messages, arguments):
    found, expected = (each.apply_chat_template(messages, **arguments) for each in (tokenizer, theirs()))
    assert (dict(found) if isinstance(found, dict) else found) == (
        dict(expected) if hasattr(expected, "keys") else expected
    )


def test_a_last_message_is_continued_as_in_transformers(tokenizer):
    arguments = {"tokenize": False, "continue_final_message": True}
    expected = theirs().apply_chat_template([USER, ASSISTANT], **arguments)
    assert tokenizer.apply_chat_template([USER, ASSISTANT], **arguments) == expected
    assert tokenizer.chat_template == theirs().chat_template


def test_ids_may_be_of_any_array_library(tokenizer):
    ids = tokenizer.encode("Hello, world!")
    for form in (tuple(ids), np.array(ids), np.array(ids, np.uint16), torch.tensor(ids), iter(ids), {"input_ids": ids}):
        assert tokenizer.decode(form) == "Hello, world!"
    for form in ([ids, ids], np.array([ids, ids]), [torch.tensor(ids), tuple(ids)]):
        assert tokenizer.decode(form) == tokenizer.batch_decode(form) == ["Hello, world!"] * 2
    assert tokenizer.decode(np.int64(ids[0])) == tokenizer.decode([torch.tensor(ids[0])]) == "Hello"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda it: it("a", return_tensors="pt"), r"return_tensors: got 'pt', expected None, as lists are given"),
        (lambda it: it(["a"], padding=True), "padding: got True, expected False, as nothing is cut or filled up"),
        (lambda it: it("a", truncation=True, max_length=5), "truncation: got True, expected False"),
        (lambda it: it.encode("a", max_length=5), "max_length: got 5, expected None"),
        (lambda it: it("a", text_pair="b"), "text_pair: got 'b', expected None"),
        (lambda it: it("a", colour="b"), "colour: got 'b', expected no such argument"),
        (lambda it: it(5), r"text: got 5 \(int\), expected a string"),
        (lambda it: it.encode(["a", 5]), r"text: got 5 \(int\), expected a string"),
        (lambda it: it(b"a"), "text: got a bytes of 1"),
        (lambda it: it.encode("\ud800"), "text: got '1 characters', expected text that UTF-8 can encode"),
        (lambda it: it.decode("a"), r"token_ids: got 'a' \(str\), expected token ids"),
        (lambda it: it.decode([1, -1]), r"token_ids\[1\]: got -1, expected a token id"),
        (lambda it: it.decode([1.5]), r"token_ids\[0\]: got 1.5 \(float\)"),
        (lambda it: it.decode([[1], 2]), r"token_ids"),
        (lambda it: it.convert_ids_to_tokens([1 << 40]), r"ids\[0\]: got 1099511627776"),
        (lambda it: it.apply_chat_template([USER], tools=[{}]), "tools: got"),
        (lambda it: it.apply_chat_template([USER], chat_template="x"), "chat_template: got 'x', expected None"),
        (lambda it: it.apply_chat_template([USER], return_tensors="np"), "return_tensors: got 'np'"),
        (lambda it: it.apply_chat_template("Hi"), r"messages: got 'Hi' \(str\)"),
        (lambda it: it.apply_chat_template([]), "messages"),
        (lambda it: it.apply_chat_template([USER], x=object()), "messages"),
    ],
)
def test_what_is_not_done_here_is_one_error_that_names_it(tokenizer, ask, said):
    with pytest.raises(RequestError, match=said) as caught:
        ask(tokenizer)
    assert "\n" not in str(caught.value)


def test_what_there_is_not_is_said_to_be_so(tokenizer):
    assert not hasattr(tokenizer, "pad")
    with pytest.raises(AttributeError, match="no transformers tokenizer, and what there is has no 'save_pretrained'"):
        tokenizer.save_pretrained("x")
    with pytest.raises(AttributeError, match="no 'labels'; there are input_ids, attention_mask"):
        tokenizer("a").labels()
    for name in ("pad_token", "chat_template", "padding_side"):
        with pytest.raises(AttributeError, match=f"{name} of a session's tokenizer cannot be set"):
            setattr(tokenizer, name, "<|im_end|>")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="belongs to its process"):
            copied(tokenizer)
    assert repr(tokenizer).endswith("smollm2-135m-instruct', 49,152 tokens)")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_input_names": 5}, "model_input_names is 5, not a list of names"),
        ({"model_input_names": ["input_ids", 5]}, "model_input_names is .*, not a list of names"),
        ({"model_max_length": "long"}, "model_max_length is 'long', not a number"),
    ],
)
def test_a_malformed_field_is_one_error_that_names_its_file(tmp_path, content, said):
    malformed = Tokenizer(byte_level(), tmp_path, TokenizerConfig(content))
    with pytest.raises(ModelFileError, match=rf"tokenizer_config\.json: {said}"):
        TextTokenizer(malformed, str(tmp_path))


def test_the_inputs_that_a_folder_names_are_given(tmp_path):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    named = TextTokenizer(Tokenizer(byte_level(), tmp_path, TokenizerConfig({"model_input_names": names})), "x")
    assert named("ab") == {"input_ids": [64, 65], "token_type_ids": [0, 0], "attention_mask": [1, 1]}


def test_what_it_gives_is_a_value(tokenizer):
    encoded = tokenizer("Hello")
    assert pickle.loads(pickle.dumps(encoded)) == copy.deepcopy(encoded) == encoded
    assert encoded.input_ids == encoded["input_ids"] == tokenizer.encode("Hello")
