"""Text, tokens and conversations mean what they mean in transformers, also token by token."""

import json
import shutil

import pytest
from demo_tokenizers import ours, theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp_shm.demo.model import demo_model_folder
from tsqp_shm.errors import ConfigError, ModelFileError, RequestError
from tsqp_shm.model.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("demo_tokenizers")
HELLO = [{"role": "user", "content": "Hello <b>&'\"\n"}]


@pytest.fixture(scope="session")
def demo_model():
    return demo_model_folder()


@pytest.fixture
def folder(tmp_path, demo_model):
    shutil.copy(demo_model / "tokenizer.json", tmp_path)
    return tmp_path


def write_template(folder, template, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "The capital of France is",
        "It's 2024: 1234567 tokens, 3.14 and ١٢٣.",
        "  two  spaces\n\n\ttab\r\n",
        "naïve 東京 🙂👩‍👩‍👧 é",
        "<|im_start|>user\nHi<|im_end|> <|endoftext|>",
        "def f(x):\n    return x**2  # 100%",
    ],
)
def test_encoding_and_decoding_equal_those_of_transformers(text):
    ids = ours().encode(text)
    assert ids == theirs().encode(text)
    assert ids == ours().encode(text, add_special_tokens=False)
    assert ours().decode(ids) == theirs().decode(ids, skip_special_tokens=True)
    assert ours().decode(ids, skip_special_tokens=False) == theirs().decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_makes_the_round_trip_that_it_makes_in_transformers(text):
    ids = ours().encode(text)
    assert ids == theirs().encode(text)
    assert ours().decode(ids, skip_special_tokens=False) == theirs().decode(ids)


def test_digits_are_tokens_of_their_own():
    assert len(ours().encode("2024")) == 4


def test_a_lone_surrogate_is_the_requests_fault():
    with pytest.raises(RequestError, match="UTF-8"):
        ours().encode("a\ud800")


def test_ids_beyond_the_vocabulary_give_no_text():
    assert ours().decode([10**6]) == ""


def test_limits_stored_in_the_file_do_not_cut_a_prompt(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    text = "more than two tokens"
    assert Tokenizer.from_folder(folder).encode(text) == ours().encode(text)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xff", b'{"model": 3}'])
def test_a_broken_tokenizer_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFileError, match="not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        HELLO,
        [{"role": "system", "content": "Be brief."}, *HELLO],
        [*HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "東京?"}],
    ],
)
def test_the_chat_template_of_the_demo_model_renders_as_in_transformers(messages, add_generation_prompt):
    expected = theirs().apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ours().apply_chat_template(messages, add_generation_prompt) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% if m.role %}\n{{ bos_token }}{{ m.content }}\n  {% endif %}\n{% endfor %}",
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ '<&>é' | tojson }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        "{{ tools is none }} {{ documents is none }} {{ nothing }} {{ eos_token }} {{ unk_token }}",
        "{{ strftime_now('%Y') | length }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_templates_see_the_environment_of_transformers(folder, template):
    from transformers import AutoTokenizer

    tokens = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    tokenizer = write_template(folder, template, tokenizer_class="PreTrainedTokenizerFast", **tokens)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        HELLO, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.apply_chat_template(HELLO) == expected


def test_the_default_of_several_named_templates_is_used(folder):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert write_template(folder, named).apply_chat_template(HELLO) == "plain"


def test_a_template_file_wins_over_the_tokenizer_config(folder):
    (folder / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert write_template(folder, "config", bos_token="<s>").apply_chat_template(HELLO) == "file <s>"


def test_special_tokens_may_be_in_a_file_of_their_own(folder):
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    assert write_template(folder, "{{ bos_token }}").apply_chat_template(HELLO) == "<s>"


def test_a_model_without_a_template_says_so(folder):
    with pytest.raises(ConfigError, match="chat_template"):
        Tokenizer.from_folder(folder).apply_chat_template(HELLO)


@pytest.mark.parametrize("template", [3, [], [{"name": "other", "template": "x"}], ["x"], "{% if %}", "{{"])
def test_a_malformed_template_is_a_model_file_error(folder, template):
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json"):
        write_template(folder, template).apply_chat_template(HELLO)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", HELLO, "roles must alternate"),
        ("{{ messages[0].content + 1 }}", HELLO, "str"),
        ("{{ messages[0].content.__class__.__mro__ }}", HELLO, "unsafe"),
        ("x", [], "at least one message"),
    ],
)
def test_messages_that_a_template_refuses_are_the_requests_fault(folder, template, messages, reason):
    with pytest.raises(RequestError, match=reason):
        write_template(folder, template).apply_chat_template(messages)
