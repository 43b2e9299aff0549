"""Text, tokens and conversations mean what they mean in transformers, also token by token."""

import functools
import json
import shutil

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from tsqp_shm.demo.model import demo_model_folder
from tsqp_shm.errors import ConfigError, ModelFileError, RequestError
from tsqp_shm.model.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello <b>&'\"\n"}]


@pytest.fixture(scope="session")
def demo_model():
    return demo_model_folder()


# Cached because loading takes long, and functions because the oracle must not be imported with this file.
@functools.cache
def ours():
    return Tokenizer.from_folder(demo_model_folder())


@functools.cache
def theirs():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_folder())


@pytest.fixture(scope="session", autouse=True)
def one_of_ours():
    # Before the first test, which would else be held to leave a process behind.
    ours()
    yield
    ours().close()


def text_by_token(tokenizer, ids, skip_special_tokens=True):
    stream = tokenizer.stream(skip_special_tokens)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


def llama_like(vocabulary):
    """A tokenizer as SentencePiece models have it: underlined spaces, byte tokens for unknown characters."""
    backend = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(vocabulary)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


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


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 49_151) | st.integers(0, 300), max_size=24), st.booleans())
def test_a_stream_adds_up_to_the_decoding_of_any_ids(ids, skip_special_tokens):
    pieces = text_by_token(ours(), ids, skip_special_tokens)
    assert "".join(pieces) == ours().decode(ids, skip_special_tokens)


@settings(deadline=None, max_examples=200)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("🙂👩‍👧東é\N{REPLACEMENT CHARACTER}")),
    st.integers(0, 3),
)
def test_a_stream_of_text_adds_up_even_where_it_is_cut_inside_a_character(text, cut):
    ids = ours().encode(text)
    ids = ids[: len(ids) - cut]
    assert "".join(text_by_token(ours(), ids)) == ours().decode(ids)


def test_a_stream_gives_an_emoji_only_when_it_is_whole():
    ids = ours().encode("🦩")
    assert len(ids) > 1
    assert text_by_token(ours(), ids) == [""] * (len(ids) - 1) + ["🦩", ""]


def test_a_stream_that_ends_inside_a_character_finishes_with_a_replacement():
    ids = ours().encode("a🦩")[:-1]
    assert text_by_token(ours(), ids)[-1] == "\N{REPLACEMENT CHARACTER}"


def test_a_stream_does_not_wait_for_bytes_that_can_no_longer_become_a_character():
    flamingo = ours().encode("🦩")
    pieces = text_by_token(ours(), flamingo[:1] * 20)
    assert max(map(len, pieces)) <= 3
    assert "".join(pieces) == ours().decode(flamingo[:1] * 20)


def test_a_finished_stream_starts_anew():
    stream = ours().stream()
    ids = ours().encode("one")
    assert ["".join([*map(stream.push, ids), stream.finish()]) for _ in range(2)] == ["one", "one"]


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁Hello", "▁world", "▁", "!", "é", "▁▁"]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([*WORDS, "<s>", "</s>", "€", "🦩"]), max_size=12), st.booleans())
def test_a_stream_keeps_the_spaces_of_a_sentencepiece_tokenizer(words, skip_special_tokens):
    backend = llama_like(BYTES + WORDS)
    ids = []
    for word in words:
        known = backend.token_to_id(word)
        ids += [known] if known is not None else list(word.encode())
    tokenizer = Tokenizer(backend, None)
    assert "".join(text_by_token(tokenizer, ids, skip_special_tokens)) == tokenizer.decode(ids, skip_special_tokens)


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
