"""The chat template of a model folder: a conversation becomes a prompt.

A template is a program from the checkpoint's author. It is compiled and rendered in a process of its own
(`model/confined.py`), in jinja2's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tsqp_shm.errors import ConfigError, LimitError, ModelFileError, RequestError
from tsqp_shm.model.added_tokens import CONFIG_FILE, TokenizerConfig
from tsqp_shm.model.confined import ConfinedError, ConfinedProcess, NoProcessError
from tsqp_shm.model.files import MAX_TEMPLATE_BYTES, ModelFiles, as_text
from tsqp_shm.model.json_fields import brief

TEMPLATE_FILE = "chat_template.jinja"
# Templates with a name each; none of them is used, as nobody asks for one by its name.
_NAMED_TEMPLATES = "additional_chat_templates"


class ChatTemplate:
    """A compiled template and the special tokens it may use."""

    def __init__(self, process: ConfinedProcess, special_tokens: Mapping[str, str], source: str) -> None:
        self._process, self._special_tokens, self.source = process, special_tokens, source

    @classmethod
    def from_folder(cls, folder: Path | ModelFiles, config: TokenizerConfig, process: ConfinedProcess) -> ChatTemplate:
        """Compiles chat_template.jinja or, without it, `chat_template` of tokenizer_config.json.

        Raises:
            ConfigError: the model has no chat template.
            ModelFileError: a file is malformed.
            LimitError: the system starts no process.
        """
        path, source = _source(ModelFiles.of(folder), config)
        try:
            process.prepare(b"C", source.encode("utf-8", "surrogatepass"))
        except ConfinedError as error:
            raise ModelFileError(path, f"malformed chat template: {error}") from error
        except NoProcessError as error:
            raise _no_process(error) from error
        return cls(process, config.special_tokens, source)

    def render(
        self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool, variables: Mapping[str, object]
    ) -> str:
        """Returns the prompt.

        Args:
            variables: more of them, over the special tokens.

        Raises:
            RequestError: there is no message, or the template refuses these, or takes too long or too much memory.
            LimitError: the system starts no process.
        """
        if not messages:
            raise RequestError("messages", [], "at least one message")
        variables = {
            **self._special_tokens,
            **variables,
            # As in transformers: templates meet what is missing better than a value that is none.
            "messages": [{key: value for key, value in each.items() if value is not None} for each in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        roles = f"roles {[message.get('role') for message in messages]}"[:80]
        try:
            content = json.dumps(variables).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError("messages", roles, f"text, numbers, lists and objects: {error}") from error
        try:
            return self._process.ask(b"R", content).decode("utf-8", "surrogatepass")
        except ConfinedError as error:
            expected = f"messages that the model's chat template accepts: {error}"
            raise RequestError("messages", roles, expected) from error
        except NoProcessError as error:
            raise _no_process(error) from error


def _no_process(error: NoProcessError) -> LimitError:
    reason = f"a chat template is run in a process of its own, and {error}; give a prompt that is laid out already"
    return LimitError("processes", reason)


def _source(files: ModelFiles, config: TokenizerConfig) -> tuple[Path, str]:
    """Source: transformers, where a template in a file hides those of tokenizer_config.json."""
    path = files.path(TEMPLATE_FILE)
    if files.has(TEMPLATE_FILE):
        return path, as_text(files.read(TEMPLATE_FILE, MAX_TEMPLATE_BYTES), path)
    others = files.path(_NAMED_TEMPLATES)
    if others.is_dir() and any(others.glob("*.jinja")):
        raise ModelFileError(others, f"chat templates with names, and no {TEMPLATE_FILE} for who names none")
    path = files.path(CONFIG_FILE)
    source = _default_template(config.content.get("chat_template"), path)
    if source is None:
        expected = f"{TEMPLATE_FILE} or chat_template in {CONFIG_FILE}, or a plain prompt"
        raise ConfigError("chat_template", None, expected)
    if len(source) > MAX_TEMPLATE_BYTES:
        raise ModelFileError(path, f"chat_template has more than {MAX_TEMPLATE_BYTES:,} characters")
    return path, source


def _default_template(template: object, path: Path) -> str | None:
    """Returns the one template there is, or the one named "default" of several."""
    if template is None or isinstance(template, str):
        return template
    named: Mapping[object, object] = template if isinstance(template, dict) else {}
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry.get("name"), str)}
    default = named.get("default")
    if not isinstance(default, str):
        raise ModelFileError(path, f'chat_template is {brief(template)}: neither text nor a list with a "default"')
    return default
