"""The tokens that a folder names beside its tokenizer.json are those of transformers, with the same ids."""

from __future__ import annotations

import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizer_habits import habits
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tsqp_shm.errors import ConfigError, ModelFileError, UnsupportedModel
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.text_tokenizer import TextTokenizer

TEXTS = [
    "", " ", "Hello world", "  two", "a\n\nb", "é🦩 東京", "<|im_start|>user\nHi<|im_end|>", "a<|tool|>b", " <|tool|> ",
    "x<|eot|>y", "<s>a</s>", "He 's here , you 're . n't ?", "a<|one|><|two|> b",
]  # fmt: skip


def byte_level() -> Backend:
    """As Qwen2 and Llama 3 have it, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return backend


def sentencepiece(bos: bool) -> Backend:
    """As Llama 2 and Mistral have it."""
    words = [
        "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "▁", "▁▁", "a", "o",
    ]  # fmt: skip
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in words[:3]])
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return backend


def padded() -> Backend:
    backend = byte_level()
    backend.enable_padding(pad_id=300, pad_token="<|eot|>")
    return backend


def token(content: str, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **off, "special": True, **flags}


def added(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, **flags)}


NEXT = str(byte_level().get_vocab_size())
LAST = str(byte_level().get_vocab_size() - 1)
# JSON can spell it, UTF-8 cannot.
HALF = "a\ud800"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# The content of tokenizer_config.json, and other files.
CASES: dict[str, tuple[Backend, dict[str, Any], dict[str, Any]]] = {
    "nothing": (byte_level(), FAST, {}),
    "in added_tokens_decoder": (byte_level(), {**FAST, "added_tokens_decoder": {NEXT: token("<|tool|>")}}, {}),
    "with another id": (byte_level(), {**FAST, "added_tokens_decoder": {"300": token("<|tool|>")}}, {}),
    "in the order of their ids": (
        byte_level(),
        {**FAST, "added_tokens_decoder": {"1000": token("<|one|>"), "999": token("<|two|>")}},
        {},
    ),
    "with flags": (
        byte_level(),
        {**FAST, "added_tokens_decoder": {NEXT: token("<|tool|>", lstrip=True, rstrip=True, special=False)}},
        {},
    ),
    "no longer special": (
        byte_level(),
        {**FAST, "added_tokens_decoder": {LAST: token("<|im_end|>", special=False)}},
        {},
    ),
    "in added_tokens.json": (byte_level(), FAST, {"added_tokens.json": {"<|tool|>": int(NEXT)}}),
    "in added_tokens.json, at an id that is taken": (
        byte_level(),
        FAST,
        {"added_tokens.json": {"<|tool|>": int(LAST)}},
    ),
    "in added_tokens.json, beside added_tokens_decoder": (
        byte_level(),
        {**FAST, "added_tokens_decoder": {NEXT: token("<|eot|>")}},
        {"added_tokens.json": {"<|tool|>": int(NEXT)}},
    ),
    "special in added_tokens.json": (
        byte_level(),
        {**FAST, "additional_special_tokens": ["<|tool|>"]},
        {"added_tokens.json": {"<|tool|>": int(NEXT)}},
    ),
    "in additional_special_tokens": (byte_level(), {**FAST, "additional_special_tokens": ["<|tool|>"]}, {}),
    "in extra_special_tokens": (byte_level(), {**FAST, "extra_special_tokens": ["<|one|>", added("<|two|>")]}, {}),
    "in extra_special_tokens by role": (byte_level(), {**FAST, "extra_special_tokens": {"tool": "<|tool|>"}}, {}),
    "by a role of the model": (byte_level(), {**FAST, "tool_token": "<|tool|>"}, {}),
    "by a role of the model, with flags": (byte_level(), {**FAST, "tool_token": added("<|tool|>", lstrip=True)}, {}),
    "eos by its text": (byte_level(), {**FAST, "eos_token": "<|eot|>"}, {}),
    "eos with flags": (byte_level(), {**FAST, "eos_token": added("<|eot|>", rstrip=True, special=False)}, {}),
    "eos of added_tokens_decoder": (
        byte_level(),
        {**FAST, "eos_token": "<|eot|>", "added_tokens_decoder": {NEXT: token("<|eot|>", rstrip=True)}},
        {},
    ),
    "pad of tokenizer.json": (padded(), FAST, {}),
    "several": (
        byte_level(),
        {**FAST, "pad_token": "<|one|>", "bos_token": "<|two|>", "additional_special_tokens": ["<|tool|>", "<|two|>"]},
        {},
    ),
    "in special_tokens_map.json": (byte_level(), FAST, {"special_tokens_map.json": {"eos_token": "<|eot|>"}}),
    "with flags in special_tokens_map.json": (
        byte_level(),
        {**FAST, "eos_token": "<|one|>"},
        {"special_tokens_map.json": {"eos_token": token("<|eot|>", lstrip=True)}},
    ),
    "in special_tokens_map.json, beside added_tokens_decoder": (
        byte_level(),
        {**FAST, "added_tokens_decoder": {}},
        {"special_tokens_map.json": {"eos_token": "<|eot|>"}},
    ),
    "a list in special_tokens_map.json": (
        byte_level(),
        {**FAST, "extra_special_tokens": ["<|one|>"]},
        {"special_tokens_map.json": {"extra_special_tokens": ["<|two|>"]}},
    ),
    "an old list in special_tokens_map.json": (
        byte_level(),
        FAST,
        {"special_tokens_map.json": {"additional_special_tokens": ["<|two|>"]}},
    ),
    "one text twice, with other flags": (
        byte_level(),
        {**FAST, "extra_special_tokens": [added("Hello", special=False), added("Hello", lstrip=True), "Hello"]},
        {},
    ),
    "one text as two roles": (
        byte_level(),
        {**FAST, "sep_token": added("<|eot|>", single_word=True), "pad_token": "<|eot|>"},
        {},
    ),
    "an old list beside a new one": (
        byte_level(),
        {**FAST, "extra_special_tokens": ["<|one|>"]},
        {"special_tokens_map.json": {"additional_special_tokens": ["<|two|>"]}},
    ),
    "flags of a token whose id is taken": (
        byte_level(),
        {**FAST, "eos_token": added("<|eot|>", rstrip=True)},
        {"added_tokens.json": {"<|eot|>": int(LAST)}},
    ),
    "an object that is no token": (byte_level(), {**FAST, "image_token": token("<|tool|>")}, {}),
    "specials are ordinary text": (byte_level(), {**FAST, "split_special_tokens": True}, {}),
    "clean-up that a BPE does not get": (byte_level(), {**FAST, "clean_up_tokenization_spaces": True}, {}),
    "bos that is wanted": (byte_level(), {**FAST, "add_bos_token": True, "bos_token": "<|im_start|>"}, {}),
    "bos that is wanted of llama": (sentencepiece(bos=False), {**LLAMA, "add_bos_token": True}, {}),
    "bos that is not wanted of llama": (sentencepiece(bos=True), {**LLAMA, "add_bos_token": False}, {}),
    "eos that is wanted of llama": (sentencepiece(bos=True), {**LLAMA, "add_eos_token": True}, {}),
    "a length": (byte_level(), {**FAST, "model_max_length": 3, "padding_side": "left"}, {}),
    "no file beside": (byte_level(), {}, {}),
}
ROLES = {"model_specific_special_tokens": {"x_token": "<|tool|>", "eos_token": added("<|eot|>", lstrip=True)}}
CASES |= {
    "by roles of the model": (byte_level(), {**FAST, **ROLES}, {}),
    "beside those of a class": (byte_level(), {"tokenizer_class": "GPTNeoXTokenizer", "sep_token": "<|eot|>"}, {}),
    "beside many of a class": (byte_level(), {"tokenizer_class": "CohereTokenizer", "eos_token": "<|eot|>"}, {}),
    "by roles of the model, beside another one": (byte_level(), {**FAST, **ROLES, "image_token": "<|one|>"}, {}),
}
# What transformers' own classes make of white space is not followed: they put a pre-tokenizer in the file's place.
NOT_OF_LLAMA = ["  two", "a\n\nb", " ", " <|tool|> ", "<s>a</s>"]


@pytest.fixture
def here(monkeypatch):
    """Has texts encoded in this process: another one for each case takes long."""
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def write(folder: Path, backend: Backend, config: dict[str, Any], files: dict[str, Any]) -> None:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if config:
        files = {**files, "tokenizer_config.json": config}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def require_same(folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    for text in texts:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special).input_ids
            assert ours.encode(text, special) == ids, (text, special)
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special), (text, special)
    assert habits(TextTokenizer(ours, str(folder)), texts) == habits(theirs, texts)


@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_are_those_of_transformers(tmp_path, here, case):
    backend, config, files = CASES[case]
    write(tmp_path, backend, config, files)
    is_llama = "Llama" in config.get("tokenizer_class", "")
    require_same(tmp_path, [text for text in TEXTS if not is_llama or text not in NOT_OF_LLAMA])


def metaspace(scheme: str) -> Backend:
    """As llama.cpp's and newer converters have it."""
    backend = sentencepiece(bos=True)
    backend.normalizer, backend.decoder = None, decoders.Metaspace()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return backend


def prefixed() -> Backend:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    return backend


@pytest.mark.parametrize("backend", [sentencepiece(bos=True), metaspace("first"), metaspace("never")])
@pytest.mark.parametrize(
    "config",
    [
        {"legacy": False},
        {"legacy": True},
        {"add_prefix_space": False},
        {"add_prefix_space": True, "legacy": True},
        {"add_prefix_space": False, "legacy": False, "added_tokens_decoder": {"1": token("<s>"), "2": token("</s>")}},
    ],
)
def test_fields_of_llama_mean_what_transformers_makes_of_them(tmp_path, here, backend, config):
    write(tmp_path, backend, {"tokenizer_class": "LlamaTokenizer", **config}, {})
    require_same(tmp_path, [*TEXTS, "a</s>b", "</s> Hello", "<unk>"])


@pytest.mark.parametrize("kind", ["GPT2TokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize(("backend", "prefix"), [(byte_level(), True), (prefixed(), False)])
def test_a_prefix_that_contradicts_tokenizer_json_is_that_of_transformers(tmp_path, here, kind, backend, prefix):
    write(tmp_path, backend, {"tokenizer_class": kind, "add_prefix_space": prefix}, {})
    require_same(tmp_path, [*TEXTS, "e\u0301 12 34", "<|endoftext|>"])


def test_a_prefix_as_in_tokenizer_json_leaves_its_pre_tokenizer(tmp_path, here):
    write(tmp_path, prefixed(), {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {})
    assert Tokenizer.from_folder(tmp_path).encode("12") == prefixed().encode("12").ids


@pytest.mark.parametrize(("kind", "network"), [("LlamaTokenizer", "mistral"), ("FooTokenizer", "llama")])
def test_a_class_that_transformers_does_not_take_has_no_fields(tmp_path, here, kind, network):
    write(tmp_path, sentencepiece(bos=True), {"tokenizer_class": kind, "legacy": False}, {})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": network}))
    require_same(tmp_path, [*TEXTS, "a</s>b"])


def test_texts_of_llama_are_made_as_its_class_makes_them(tmp_path, here):
    from transformers import AutoTokenizer

    write(tmp_path, metaspace("first"), LLAMA, {})
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_process_of_its_own_follows_the_class(tmp_path):
    write(tmp_path, sentencepiece(bos=True), {"tokenizer_class": "LlamaTokenizer", "legacy": False}, {})
    require_same(tmp_path, ["a</s>b", " Hello"])


@pytest.mark.parametrize(
    ("backend", "config", "field"),
    [
        (
            byte_level(),
            {"tokenizer_class": "LlamaTokenizerFast", "auto_map": {"AutoTokenizer": ["x.X", None]}},
            "auto_map",
        ),
        (byte_level(), {"tokenizer_class": "XTokenizer", "auto_map": ["x.X", None]}, "auto_map"),
        (byte_level(), {"tokenizer_class": "BertTokenizerFast"}, "tokenizer_class"),
        (Backend(models.WordLevel({"a": 0}, "a")), {"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class"),
        (byte_level(), {"tokenizer_class": "GPTNeoXTokenizerFast", "add_prefix_space": True}, "add_prefix_space"),
        (byte_level(), {"tokenizer_class": "CohereTokenizer", "do_lower_case": True}, "do_lower_case"),
    ],
)
def test_what_a_class_makes_otherwise_is_refused_by_name(tmp_path, here, backend, config, field):
    write(tmp_path, backend, config, {})
    with pytest.raises(UnsupportedModel) as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.field == field


def random_folder(choose: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tokenizer_config.json and other files, that say anything they can about tokens."""
    words = ["<|tool|>", "<|eot|>", "<|one|>", "<|two|>", "<|im_end|>", "<s>", "Hello", "a", " b", "<|endoftext|>"]

    def flagged() -> dict[str, Any]:
        flags = {name: choose.random() < 0.25 for name in ("lstrip", "rstrip", "normalized", "single_word")}
        return {**token(choose.choice(words), special=choose.random() < 0.6), **flags}

    def any_token() -> Any:
        typed = {"__type": "AddedToken"} if choose.random() < 0.9 else {}
        return choose.choice(words) if choose.random() < 0.5 else {**typed, **flagged()}

    def sometimes(share: float, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if choose.random() < share}

    def by_name() -> dict[str, int]:
        return {choose.choice(words): choose.choice([256, 258, 259, 260, 400]) for _ in range(choose.randint(0, 3))}

    roles = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "image_token")
    several = [any_token() for _ in range(choose.randint(0, 3))]
    by_role = {role: choose.choice(words) for role in ("r0", "r1_token")[: choose.randint(0, 2)]}
    by_id = {str(choose.choice([255, 257, 258, 259, 300, 1000])): flagged() for _ in range(choose.randint(0, 3))}
    config = {
        **FAST,
        **sometimes(0.25, {role: any_token() for role in roles}),
        **sometimes(0.4, {"extra_special_tokens": several if choose.random() < 0.6 else by_role}),
        **sometimes(0.3, {"additional_special_tokens": [any_token() for _ in range(choose.randint(0, 3))]}),
        **sometimes(0.4, {"added_tokens_decoder": by_id}),
        **sometimes(0.3, {"split_special_tokens": choose.random() < 0.5, "add_bos_token": True}),
    }
    legacy = {
        **sometimes(0.4, {role: choose.choice(words) for role in roles[:5]}),
        **sometimes(0.3, {"additional_special_tokens": choose.sample(words, 2)}),
        **sometimes(0.2, {"extra_special_tokens": choose.sample(words, 2)}),
    }
    return config, sometimes(0.4, {"special_tokens_map.json": legacy, "added_tokens.json": by_name()})


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_random_folders_have_the_ids_of_transformers(tmp_path, here, seed):
    from transformers import AutoTokenizer

    choose = random.Random(seed)
    compared = 0
    for number in range(150):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, choose.choice([byte_level, padded])(), *random_folder(choose))
        try:
            AutoTokenizer.from_pretrained(folder)
        except (TypeError, ValueError, AttributeError):
            continue
        require_same(folder, [*TEXTS, "<|one|><|eot|> Hello<|tool|>b a", "<|endoftext|> <s>Hello"])
        compared += 1
    assert compared > 50


def test_the_process_of_its_own_encodes_as_this_one(tmp_path):
    write(tmp_path, *CASES["several"])
    require_same(tmp_path, TEXTS)


@pytest.mark.parametrize("case", [case for case in CASES if "special_tokens_map" in case])
def test_a_chat_template_sees_the_special_tokens_of_transformers(tmp_path, case):
    from transformers import AutoTokenizer

    backend, config, files = CASES[case]
    write(tmp_path, backend, {**config, "chat_template": "{{ eos_token }}|{{ bos_token }}|{{ tool }}"}, files)
    messages = [{"role": "user", "content": "x"}]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(messages) == expected


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces"),
        ({"fix_mistral_regex": True}, "fix_mistral_regex"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(tmp_path, here, config, field):
    words = Backend(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    write(tmp_path, words, {**FAST, **config}, {})
    with pytest.raises(UnsupportedModel) as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": token("a")}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1" * 5000: token("a")}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": 3}}}, "added_tokens_decoder"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1": {**token("a"), "\x1b": True}}},
            "added_tokens_decoder",
        ),
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token"),
        ("tokenizer_config.json", {"tokenizer_class": 3}, "tokenizer_class"),
        ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": 1}, "add_prefix_space"),
        ("tokenizer_config.json", {"model_specific_special_tokens": ["a"]}, "model_specific_special_tokens"),
        ("tokenizer_config.json", {"extra_special_tokens": [["a"]]}, "extra_special_tokens"),
        ("special_tokens_map.json", {"eos_token": {"content": "a", "lstrip": "yes"}}, "eos_token"),
        ("added_tokens.json", {"a": "b"}, "the id of 'a'"),
        ("added_tokens.json", {"\x1b[2J": -1}, "the id of"),
        ("tokenizer_config.json", {"\x1b[2J_token": added(HALF)}, "half a character"),
        ("tokenizer_config.json", {"bos_token": HALF}, "bos_token"),
        ("tokenizer_config.json", {"eos_token": added(HALF)}, "eos_token"),
        ("tokenizer_config.json", {"tool_token": HALF}, "tool_token"),
        ("tokenizer_config.json", {"additional_special_tokens": [HALF]}, "extra_special_tokens"),
        ("tokenizer_config.json", {"additional_special_tokens": [added(HALF)]}, "extra_special_tokens"),
        ("tokenizer_config.json", {"additional_special_tokens": {"tool": HALF}}, "tool"),
        ("tokenizer_config.json", {"extra_special_tokens": {"tool": added(HALF)}}, "tool"),
        ("tokenizer_config.json", {"added_tokens_decoder": {NEXT: token(HALF)}}, "added_tokens_decoder"),
        ("special_tokens_map.json", {"bos_token": HALF}, "bos_token"),
        ("special_tokens_map.json", {"bos_token": token(HALF)}, "bos_token"),
        ("special_tokens_map.json", {"additional_special_tokens": [HALF]}, "extra_special_tokens"),
        ("special_tokens_map.json", {"extra_special_tokens": [token(HALF)]}, "extra_special_tokens"),
        ("added_tokens.json", {HALF: int(NEXT)}, "half a character"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_the_field(tmp_path, here, name, content, said):
    write(tmp_path, byte_level(), {}, {name: content})
    with pytest.raises(ModelFileError, match=said) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(caught.value).isprintable()
    assert caught.value.__cause__ is None


def test_a_tokenizer_larger_than_any_real_one_is_refused_unread(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ModelFileError, match="larger than 67,108,864 bytes"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"AutoTokenizer\.from_pretrained\(FOLDER\)\.save_pretrained"):
        Tokenizer.from_folder(tmp_path)


def test_templates_with_names_alone_are_none(tmp_path):
    write(tmp_path, byte_level(), FAST, {})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    read = Tokenizer.from_folder(tmp_path)
    with pytest.raises(ModelFileError, match="additional_chat_templates"):
        read.apply_chat_template([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("default")
    read = Tokenizer.from_folder(tmp_path)
    assert read.apply_chat_template([{"role": "user", "content": "x"}]) == "default"


def test_a_model_without_any_template_says_so(tmp_path, here):
    write(tmp_path, byte_level(), FAST, {})
    with pytest.raises(ConfigError, match="chat_template"):
        Tokenizer.from_folder(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])
