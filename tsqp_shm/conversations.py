"""Conversations in the forms in which callers have them, and the prompts that a chat template makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tsqp_shm.errors import RequestError, described
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.scalars import flag, is_several, text

Message = Mapping[str, Any]
# transformers' way to find where a final message ends: a template may trim it, or write something behind it.
_END_OF_MESSAGE = "CONTINUE_FINAL_MESSAGE_TAG "


def as_conversations(value: object) -> list[list[Message]]:
    """One conversation or several, as in vLLM: a list of messages, or a list of such lists.

    Raises:
        RequestError: a message is none.
    """
    listed = _listed(value, "messages", "a list of messages, or of such lists")
    if any(isinstance(item, Mapping) for item in listed):
        return [_conversation(listed, "messages")]
    return [_conversation(item, f"messages[{index}]") for index, item in enumerate(listed)]


def as_conversation(value: object) -> list[Message]:
    """Exactly one conversation.

    Raises:
        RequestError: it is none, or a message is none.
    """
    return _conversation(value, "messages")


def render(
    tokenizer: Tokenizer,
    messages: list[Message],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Mapping[str, object] | None = None,
) -> str:
    """The text by which a model is asked to answer, or to go on with the last message.

    Args:
        variables: more of them for the template.

    Raises:
        ConfigError: the model has no chat template.
        RequestError: the template refuses the messages, or does not end with the last.
    """
    for name, value in (
        ("add_generation_prompt", add_generation_prompt),
        ("continue_final_message", continue_final_message),
    ):
        if flag(value) is None:
            raise RequestError(name, value, "True or False", is_mistyped=True)
    if not continue_final_message:
        return tokenizer.apply_chat_template(messages, add_generation_prompt, variables)
    if add_generation_prompt:
        expected = "only one of add_generation_prompt and continue_final_message"
        raise RequestError("continue_final_message", True, expected)
    if not messages or messages[-1]["content"] is None:
        raise RequestError("messages", messages, "a last message with content, as it is to be continued")
    last = {**messages[-1], "content": messages[-1]["content"] + _END_OF_MESSAGE}
    rendered = tokenizer.apply_chat_template([*messages[:-1], last], add_generation_prompt, variables)
    end = rendered.rfind(_END_OF_MESSAGE.strip())
    if end < 0:
        raise RequestError(
            "messages", messages, "a chat template that shows the last message, as it is to be continued"
        )
    # A template that keeps the spaces behind a message keeps the tag's, too.
    return rendered[:end] if rendered.startswith(_END_OF_MESSAGE, end) else rendered[:end].rstrip()


def _conversation(value: object, name: str) -> list[Message]:
    listed = _listed(value, name, "a list of messages")
    if not listed:
        raise RequestError(name, value, "at least one message")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(listed)]


def _message(value: object, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise RequestError(name, value, "a dict with role and content", is_mistyped=True)
    for key in ("role", "content"):
        if key not in value:
            raise RequestError(name, value, f"a {key} in it")
    message: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise RequestError(f"{name}: key {described(key)}", key, "a string", is_mistyped=True)
        message[key] = item
    role = text(value["role"])
    if not role:
        raise RequestError(f"{name}['role']", value["role"], "a string, not empty", is_mistyped=role is None)
    message |= {"role": role, "content": _content(value["content"], f"{name}['content']")}
    try:
        # What else there is (tool_calls, name, ...) is for the template, which runs in another process.
        plain: Message = json.loads(json.dumps(message))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(name, value, f"values that JSON has: {error}") from error
    return plain


def _content(value: object, name: str) -> str | None:
    """Text, or OpenAI's list of parts: their texts, each on a line of its own, as in vLLM."""
    content = text(value)
    if value is None or content is not None:
        return content
    parts = _listed(value, name, 'a string, or a list of {"type": "text", "text": ...}')
    return "\n".join(_part(part, f"{name}[{index}]") for index, part in enumerate(parts))


def _part(value: object, name: str) -> str:
    content = text(value)
    if content is None and isinstance(value, Mapping):
        if value.get("type", "text") != "text":
            raise RequestError(f"{name}['type']", value["type"], "text: this runtime takes nothing else")
        content = text(value.get("text"))
    if content is None:
        raise RequestError(name, value, 'a dict as {"type": "text", "text": ...}', is_mistyped=True)
    return content


def _listed(value: object, name: str, expected: str) -> list[Any]:
    if not is_several(value):
        raise RequestError(name, value, expected, is_mistyped=True)
    return list(value)
