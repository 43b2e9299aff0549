"""The chat template of a model folder: a conversation becomes a prompt.

A template is a program from the checkpoint's author. It runs in jinja2's sandbox, with the environment of
transformers (`chat_template_utils.py`), because templates are written and tested against that one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tsqp_shm.errors import ConfigError, ModelFileError, RequestError
from tsqp_shm.model.json_fields import brief, read_json_object

if TYPE_CHECKING:
    from jinja2 import Template

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled template and the special tokens it may use.

    Args:
        path: the file that the source is from, for messages.
    Raises:
        ModelFileError: the source is not a valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], path: Path) -> None:
        self._special_tokens = special_tokens
        self._template = _compile(source, path)

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """Loads chat_template.jinja or, without it, `chat_template` of tokenizer_config.json.

        Raises:
            ConfigError: the model has no chat template.
            ModelFileError: a file is malformed.
        """
        path = folder / "tokenizer_config.json"
        config = read_json_object(path) if path.exists() else {}
        # Older checkpoints name their special tokens in a file of their own.
        legacy = folder / "special_tokens_map.json"
        tokens = {**read_json_object(legacy), **config} if legacy.exists() else config

        source = _default_template(config.get("chat_template"), path)
        if (folder / "chat_template.jinja").exists():
            path = folder / "chat_template.jinja"
            try:
                source = path.read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise ModelFileError(path, str(error)) from error
        if source is None:
            expected = "chat_template.jinja or chat_template in tokenizer_config.json, or a plain prompt"
            raise ConfigError("chat_template", None, expected)
        return cls(source, _special_tokens(tokens), path)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """Returns the prompt.

        Raises:
            RequestError: there is no message, or the template refuses these.
        """
        if not messages:
            raise RequestError("messages", [], "at least one message")
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        # A template can raise anything that Python can: a missing key, a None that is added to a string.
        except Exception as error:
            roles = [message.get("role") for message in messages]
            expected = f"messages that the model's chat template accepts: {error}"
            raise RequestError("messages", f"roles {roles}"[:80], expected) from error


def _compile(source: str, path: Path) -> Template:
    # Imported here because only conversations need it: a trusted process with plain prompts runs without.
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(jinja2.ext.Extension):
        """Renders the body of `{% generation %}`, a tag that marks the assistant's tokens for training."""

        tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelFileError(path, f"malformed chat template: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Returns the special tokens by name; a config holds one as a string or as an object with its content."""
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _default_template(template: object, path: Path) -> str | None:
    """Returns the one template there is, or the one named "default" in a list of named ones."""
    if template is None or isinstance(template, str):
        return template
    named: dict[object, object] = {}
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {entry.get("name"): entry.get("template") for entry in template}
    default = named.get("default")
    if not isinstance(default, str):
        raise ModelFileError(path, f'chat_template is {brief(template)}: neither text nor a list with a "default"')
    return default
