"""The tokens that a model folder names beside its tokenizer.json: in tokenizer_config.json, or in the files of older
checkpoints, special_tokens_map.json and added_tokens.json.

Source: transformers' `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`, whose order decides
the ids: a token that the vocabulary lacks gets the next one, whatever id its file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers

from tsqp_shm.errors import ModelFileError, UnsupportedModel
from tsqp_shm.model.files import MAX_TOKENIZER_CONFIG_BYTES, is_there
from tsqp_shm.model.json_fields import brief, read_json_object

CONFIG_FILE = "tokenizer_config.json"
# In the order in which transformers adds them.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# A token as `tokenizers.AddedToken` takes it: "content", and the flags that are said.
TokenFields = dict[str, str | bool]
# One that is named without flags is a string.
Token = str | TokenFields


@dataclass(frozen=True)
class TokenizerConfig:
    """What the files beside tokenizer.json say.

    Attributes:
        content: tokenizer_config.json, {} if there is none.
        added: by id, as far as transformers reads them.
        named: special tokens by their role.
        extra: further special tokens.
    """

    content: Mapping[str, object] = field(default_factory=dict)
    added: Mapping[int, TokenFields] = field(default_factory=dict)
    named: Mapping[str, Token] = field(default_factory=dict)
    extra: tuple[Token, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path, backend: tokenizers.Tokenizer) -> TokenizerConfig:
        """Raises:
        ModelFileError: a file is malformed.
        UnsupportedModel: a field asks for what is not done here.
        """
        path = folder / CONFIG_FILE
        config = read_json_object(path, MAX_TOKENIZER_CONFIG_BYTES) if is_there(path) else {}
        _refuse_unsupported(config, backend)
        fields = dict(config)
        if not fields.get("extra_special_tokens") and "additional_special_tokens" in fields:
            fields["extra_special_tokens"] = fields.pop("additional_special_tokens")
        added: dict[int, TokenFields] = {}
        if "added_tokens_decoder" in fields:
            added = _by_id(fields["added_tokens_decoder"], path)
        else:
            legacy = folder / "special_tokens_map.json"
            if is_there(legacy):
                _merge(fields, read_json_object(legacy, MAX_TOKENIZER_CONFIG_BYTES), legacy)
            names = {_content(fields[name]) for name in _NAMED if fields.get(name)}
            names |= {_content(token) for token in _as_list(fields.get("extra_special_tokens"))}
            legacy = folder / "added_tokens.json"
            if is_there(legacy):
                added = _by_name(read_json_object(legacy, MAX_TOKENIZER_CONFIG_BYTES), names, legacy)
            added |= {number: _fields_of(token) for number, token in backend.get_added_tokens_decoder().items()}
        return cls(config, added, *_specials(fields, added, backend, path))

    @property
    def special_tokens(self) -> dict[str, str]:
        """By their role, as a chat template sees them."""
        return {name: _content(token) for name, token in self.named.items()}

    @property
    def splits_special_tokens(self) -> bool:
        """Whether text that spells a special token is ordinary text."""
        return self.content.get("split_special_tokens") is True

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Tells a tokenizer of the tokens."""
        backend.add_tokens([tokenizers.AddedToken(**token) for token in self.tokens_to_add(backend)])  # type: ignore[arg-type]  # its flags are bool
        backend.encode_special_tokens = self.splits_special_tokens

    def tokens_to_add(self, backend: tokenizers.Tokenizer) -> list[TokenFields]:
        """Those that the tokenizer is told of, in their order; it passes over the ones that it has."""
        tokens: list[Token] = [self.added[number] for number in sorted(self.added)]
        known = {token.content for token in backend.get_added_tokens_decoder().values()} | set(map(_content, tokens))
        for token in (*self.named.values(), *self.extra):
            if _content(token) not in known:
                tokens.append(token)
                known.add(_content(token))
        names = set(map(_content, self.named.values()))
        return [
            {"content": token, "special": True}
            if isinstance(token, str)
            else {**token, "special": bool(token.get("special")) or token["content"] in names}
            for token in tokens
        ]


def _refuse_unsupported(config: Mapping[str, object], backend: tokenizers.Tokenizer) -> None:
    """Raises for what transformers does with a text beside what the tokenizer does."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    is_bpe = isinstance(backend.model, tokenizers.models.BPE)
    if config.get("clean_up_tokenization_spaces") and (not is_bpe or config.get(forced)):
        supported = "false, or a BPE tokenizer, where it changes nothing"
        raise UnsupportedModel("clean_up_tokenization_spaces", True, supported)
    if config.get("fix_mistral_regex"):
        raise UnsupportedModel("fix_mistral_regex", True, "a tokenizer.json that has the right expression")


def _specials(
    fields: Mapping[str, object], added: Mapping[int, TokenFields], backend: tokenizers.Tokenizer, path: Path
) -> tuple[dict[str, Token], tuple[Token, ...]]:
    """The special tokens by their role, those of a model's own roles last; and those without one."""
    with_flags = {str(token["content"]): token for token in added.values()}
    named: dict[str, Token] = {}
    padding = backend.padding or {}
    for name in _NAMED:
        token = _token(fields.get(name, padding.get("pad_token") if name == "pad_token" else None), name, path)
        if token is not None:
            named[name] = with_flags.get(_content(token), token)
    own = {name: token for name, token in fields.items() if name.endswith("_token") and name not in _NAMED}
    extra = fields.get("extra_special_tokens")
    roles = extra if isinstance(extra, dict) else {}
    for name, value in (*own.items(), *roles.items()):
        # A flag such as "add_bos_token" has such a name too.
        if isinstance(value, (str, dict)) and (token := _token(value, name, path)) is not None:
            named[name] = token
    without = [] if isinstance(extra, dict) else _as_list(extra)
    tokens = [_token(token, "extra_special_tokens", path) for token in without]
    return named, tuple(token for token in tokens if token is not None)


def _merge(fields: dict[str, object], legacy: Mapping[str, object], path: Path) -> None:
    """What special_tokens_map.json says wins over tokenizer_config.json; a list of more tokens is added to its own."""
    for name, value in legacy.items():
        if isinstance(value, dict) and "content" in value:
            fields[name] = {**value, "special": True}
        elif name in ("extra_special_tokens", "additional_special_tokens") and isinstance(value, list):
            listed = fields.get("extra_special_tokens")
            if isinstance(listed, dict):
                raise ModelFileError(path, f"{name} is a list, and an object in {CONFIG_FILE}")
            fields["extra_special_tokens"] = [*_as_list(listed), *value]
        else:
            fields[name] = value


def _by_id(value: object, path: Path) -> dict[int, TokenFields]:
    if not isinstance(value, dict):
        raise ModelFileError(path, f"added_tokens_decoder is {brief(value)}, not an object of tokens by their ids")
    tokens: dict[int, TokenFields] = {}
    for number, token in value.items():
        read = _token(token, "added_tokens_decoder", path)
        if not number.isdecimal() or len(number) > 10 or not isinstance(read, dict):
            raise ModelFileError(path, "added_tokens_decoder is not an object of tokens by their ids")
        tokens[int(number)] = read
    return tokens


def _by_name(value: Mapping[str, object], special: set[str], path: Path) -> dict[int, TokenFields]:
    tokens: dict[int, TokenFields] = {}
    for content, number in value.items():
        if type(number) is not int or number < 0:
            raise ModelFileError(path, f"the id of {brief(content)!r} is {brief(number)!r}")
        is_special = content in special
        tokens[number] = {"content": content, "normalized": not is_special, "special": is_special}
    return tokens


def _token(value: object, name: str, path: Path) -> Token | None:
    """A token as a file says it: its text, or an object with that and flags."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, dict):
        fields = {key: flag for key, flag in value.items() if key not in ("__type", "id")}
        flags = {key: flag for key, flag in fields.items() if key != "content"}
        is_sound = all(key in _FLAGS and isinstance(flag, bool) for key, flag in flags.items())
        if isinstance(fields.get("content"), str) and fields["content"] and is_sound:
            return fields
    raise ModelFileError(path, f"{name} is {brief(value)!r}, neither a token's text nor an object with its content")


def _fields_of(token: tokenizers.AddedToken) -> TokenFields:
    return {"content": token.content, **{name: getattr(token, name) for name in _FLAGS}}


def _content(token: object) -> str:
    return str(token.get("content")) if isinstance(token, Mapping) else str(token)


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, dict)) else []
