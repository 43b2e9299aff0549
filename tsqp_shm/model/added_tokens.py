"""The tokens that a model folder names beside its tokenizer.json: in tokenizer_config.json, or in the files of older
checkpoints, special_tokens_map.json and added_tokens.json.

Source: transformers' `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`, in their order: it
decides which of two files counts, which flags a token has, and the ids. A token that the vocabulary lacks gets the next
one, whatever id its file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from tsqp_shm.errors import ModelFileError, UnsupportedModel
from tsqp_shm.model.files import MAX_TOKENIZER_CONFIG_BYTES, ModelFiles
from tsqp_shm.model.json_fields import brief, read_model_json
from tsqp_shm.printable import is_text, quoted

CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_FILE, _ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
# In the order in which transformers adds them.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_ROLES = "model_specific_special_tokens"

# One that is named without flags is a string.
Token = str | AddedToken


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
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    named: Mapping[str, Token] = field(default_factory=dict)
    extra: tuple[Token, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path | ModelFiles, backend: tokenizers.Tokenizer) -> TokenizerConfig:
        """Raises:
        ModelFileError: a file is malformed.
        UnsupportedModel: a field asks for what is not done here.
        """
        files = ModelFiles.of(folder)
        path = files.path(CONFIG_FILE)
        config = read_model_json(files, CONFIG_FILE, MAX_TOKENIZER_CONFIG_BYTES) if files.has(CONFIG_FILE) else {}
        _refuse_unsupported(config, backend)
        fields = dict(config)
        if _OLD_EXTRA in fields and not fields.get(_EXTRA):
            fields[_EXTRA] = fields.pop(_OLD_EXTRA)
        roles = {name: fields.pop(name) for name in list(fields) if _is_role(name) and isinstance(fields[name], str)}
        roles |= _taken_roles(fields)
        said = fields.pop(_ROLES, None) or {}
        if not isinstance(said, dict):
            raise ModelFileError(path, f"{_ROLES} is {brief(said)!r}, not an object of tokens by their roles")
        # Transformers forgets it beside any role that is found otherwise.
        roles = roles or said
        if "added_tokens_decoder" in fields:
            added = _by_id(fields["added_tokens_decoder"], path)
        else:
            added = _legacy(files, fields, roles, backend)
        if _OLD_EXTRA in fields and _EXTRA not in fields:
            fields[_EXTRA] = fields[_OLD_EXTRA]

        named: dict[str, Token] = {}
        # Also of a token whose id another one has taken.
        with_flags = {token.content: token for _, token in added}
        if backend.padding:
            fields.setdefault("pad_token", backend.padding["pad_token"])
        for name in NAMED:
            if fields.get(name):
                token = _token(fields[name], name, path)
                named[name] = with_flags.get(_text(token), token)
        with_type = {name: value for name, value in fields.items() if _is_role(name) and _is_typed(value)}
        for name, value in {**with_type, **roles}.items():
            named[name] = _token(value, name, path)
        extra = fields.get(_EXTRA) or []
        if not isinstance(extra, list):
            raise ModelFileError(path, f"{_EXTRA} is {brief(extra)!r}, not a list of tokens")
        return cls(config, dict(added), named, tuple(_token(value, _EXTRA, path) for value in extra))

    @property
    def special_tokens(self) -> dict[str, str]:
        """By their role, as a chat template sees them."""
        return {name: _text(token) for name, token in self.named.items()}

    @property
    def splits_special_tokens(self) -> bool:
        """Whether text that spells a special token is ordinary text."""
        return self.content.get("split_special_tokens") is True

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Tells a tokenizer of the tokens."""
        backend.add_tokens([AddedToken(**token) for token in self.tokens_to_add(backend)])  # type: ignore[arg-type]
        backend.encode_special_tokens = self.splits_special_tokens

    def tokens_to_add(self, backend: tokenizers.Tokenizer) -> list[dict[str, str | bool]]:
        """Those that the tokenizer is told of, by text and flags. Of two with one text the later one's flags count."""
        tokens: list[Token] = [self.added[number] for number in sorted(self.added)]
        known = {token.content for token in backend.get_added_tokens_decoder().values()} | set(map(_text, tokens))
        # Sets, as a file may name a million.
        more = dict.fromkeys(token for token in (*self.named.values(), *self.extra) if _text(token) not in known)
        tokens += more
        names = set(map(_text, self.named.values()))
        described = [
            _described(AddedToken(token, special=True) if isinstance(token, str) else token) for token in tokens
        ]
        return [{**token, "special": token["special"] or token["content"] in names} for token in described]


def _refuse_unsupported(config: Mapping[str, object], backend: tokenizers.Tokenizer) -> None:
    """Raises for what transformers does with a text beside what the tokenizer does."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    is_bpe = isinstance(backend.model, tokenizers.models.BPE)
    if config.get("clean_up_tokenization_spaces") and (not is_bpe or config.get(forced)):
        supported = "false, or a BPE tokenizer, where it changes nothing"
        raise UnsupportedModel("clean_up_tokenization_spaces", True, supported)
    if config.get("fix_mistral_regex"):
        raise UnsupportedModel("fix_mistral_regex", True, "a tokenizer.json that has the right expression")


def _is_role(name: str) -> bool:
    """Whether it may be a token's role that only this model has, such as "image_token"."""
    return name.endswith("_token") and name not in NAMED


def _taken_roles(fields: dict[str, object]) -> dict[str, object]:
    """More special tokens may be a list, or an object in which each has a role."""
    if isinstance(roles := fields.get(_EXTRA), dict):
        del fields[_EXTRA]
        return roles
    return {}


def _legacy(
    files: ModelFiles, fields: dict[str, object], roles: dict[str, object], backend: tokenizers.Tokenizer
) -> list[tuple[int, AddedToken]]:
    """The files that count where tokenizer_config.json has no added_tokens_decoder; what special_tokens_map.json says
    wins over `fields`, but for a list, which is added to the one there.

    Returns:
        The tokens of added_tokens.json, and then of tokenizer.json, with their ids.
    """
    path = files.path(_SPECIAL_FILE)
    said = read_model_json(files, _SPECIAL_FILE, MAX_TOKENIZER_CONFIG_BYTES) if files.has(_SPECIAL_FILE) else {}
    for name, value in said.items():
        listed = fields.get(_EXTRA)
        if isinstance(value, dict) and name != _EXTRA:
            fields[name] = _token({**value, "special": True}, name, path)
        elif isinstance(value, list) and name == _EXTRA and (listed is None or isinstance(listed, list)):
            tokens = [
                _token({**token, "special": True}, name, path) if isinstance(token, dict) else token for token in value
            ]
            fields[name] = [*(listed or []), *tokens]
        else:
            fields[name] = value
    roles |= _taken_roles(fields)

    path = files.path(_ADDED_FILE)
    added: list[tuple[int, AddedToken]] = []
    if files.has(_ADDED_FILE):
        extra = fields.get(_EXTRA)
        named = [fields[name] for name in NAMED if fields.get(name)]
        # An object that is no token yet is not looked into.
        candidates = [*named, *extra] if isinstance(extra, list) else named
        special = {_text(token) for token in candidates if isinstance(token, (str, AddedToken))}
        for text, number in read_model_json(files, _ADDED_FILE, MAX_TOKENIZER_CONFIG_BYTES).items():
            if type(number) is not int or not 0 <= number < 1 << 31:
                raise ModelFileError(path, f"the id of {brief(text)!r} is {brief(number)!r}")
            _require_text(text, "a token", path)
            added.append((number, AddedToken(text, normalized=text not in special, special=text in special)))
    return [*added, *backend.get_added_tokens_decoder().items()]


def _by_id(value: object, path: Path) -> list[tuple[int, AddedToken]]:
    expected = "added_tokens_decoder is not an object of tokens by their ids"
    if not isinstance(value, dict):
        raise ModelFileError(path, expected)
    tokens: list[tuple[int, AddedToken]] = []
    for number, fields in value.items():
        token = _token(fields, "added_tokens_decoder", path)
        if not number.isdecimal() or len(number) > 10 or isinstance(token, str):
            raise ModelFileError(path, expected)
        tokens.append((int(number), token))
    return tokens


def _token(value: object, name: str, path: Path) -> Token:
    """A token as a file says it: its text, or an object with that and flags."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        return _require_text(value, name, path)
    if isinstance(value, dict):
        flags = {key: flag for key, flag in value.items() if key not in ("__type", "id", "content")}
        is_sound = all(key in _FLAGS and isinstance(flag, bool) for key, flag in flags.items())
        if isinstance(value.get("content"), str) and is_sound:
            return AddedToken(_require_text(value["content"], name, path), **flags)
    raise ModelFileError(
        path, f"{quoted(name)} is {brief(value)!r}, neither a token's text nor an object with its content"
    )


def _require_text(token: str, name: str, path: Path) -> str:
    """Raises for what JSON can spell and UTF-8, which the tokenizer speaks, cannot."""
    if not is_text(token):
        raise ModelFileError(path, f"{quoted(name)} is {brief(token)!r}, which no UTF-8 is: it holds half a character")
    return token


def _is_typed(value: object) -> bool:
    """Whether transformers takes a value for a token, in a field whose name alone does not say that it is one."""
    is_token = isinstance(value, dict) and value.get("__type") == "AddedToken"
    return is_token or isinstance(value, (str, AddedToken))


def _described(token: AddedToken) -> dict[str, str | bool]:
    return {"content": token.content, **{name: getattr(token, name) for name in _FLAGS}}


def _text(token: Token) -> str:
    return token if isinstance(token, str) else token.content
