"""Prompts in the forms in which callers have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

from tsqp_shm.errors import RequestError, described
from tsqp_shm.printable import is_text
from tsqp_shm.scalars import is_several, plain, text
from tsqp_shm.tee.sampling_params import SamplingParams

# Bytes are numbers to Python and text to whoever has them; a set has no order.
_NO_SEQUENCES = (str, bytes, bytearray, memoryview, Mapping, set, frozenset)
# What may be one: a string, token ids, one of vLLM's dicts; as several, a sequence of these.
Form = str | Mapping[str, Any] | Iterable[Any]
_FORMS = "a string, token ids, or a dict with prompt or prompt_token_ids"


class Prompt(NamedTuple):
    """One prompt; its token ids have not been looked at yet.

    Attributes:
        name: what it is to the caller, for messages: "prompt", or "prompts[3]".
        text: as it was given, None where it was not.
        token_ids: those that were given; None: those of the text.
    """

    name: str
    text: str | None
    token_ids: Iterable[Any] | None


def as_prompts(value: object) -> list[Prompt]:
    """One prompt or several, as in vLLM: a flat sequence of numbers is one, any other sequence is several.

    Raises:
        RequestError: one of them is no prompt.
    """
    if isinstance(value, (str, Mapping)):
        return [_prompt(value, "prompt")]
    items = iter(_items(value, "prompts", f"{_FORMS}, or a sequence of these"))
    for first in items:
        rest = chain([first], items)
        if isinstance(plain(first), (bool, int, float, complex)):
            return [Prompt("prompt", None, rest)]
        return [_prompt(item, f"prompts[{index}]") for index, item in enumerate(rest)]
    return []


def as_prompt(value: object) -> Prompt:
    """Exactly one prompt.

    Raises:
        RequestError: it is none.
    """
    return _prompt(value, "prompt")


def _prompt(value: object, name: str) -> Prompt:
    if isinstance(value, Mapping):
        return _from_mapping(value, name)
    given = text(value)
    if given is not None:
        return Prompt(name, _encodable(given, name), None)
    return Prompt(name, None, _items(value, name, _FORMS))


def _from_mapping(value: Mapping[Any, object], name: str) -> Prompt:
    """Of vLLM's dicts. A key that is not known is one whose meaning would be lost."""
    for key in value:
        if key not in ("prompt", "prompt_token_ids"):
            raise RequestError(f"{name}[{described(key)}]", value[key], "no such key: prompt or prompt_token_ids")
    given, token_ids = value.get("prompt"), value.get("prompt_token_ids")
    if given is None and token_ids is None:
        raise RequestError(name, value, "prompt or prompt_token_ids")
    words = text(given)
    if given is not None and words is None:
        raise RequestError(f"{name}['prompt']", given, "a string", is_mistyped=True)
    if token_ids is not None:
        token_ids = _items(token_ids, f"{name}['prompt_token_ids']", "token ids")
    return Prompt(name, None if words is None else _encodable(words, name), token_ids)


def _items(value: Any, name: str, expected: str) -> Iterable[Any]:
    """The items of a sequence of any library, as Python's own where it can give them so."""
    if isinstance(value, _NO_SEQUENCES):
        raise RequestError(name, value, expected, is_mistyped=True)
    try:
        dimensions = len(value.shape) if hasattr(value, "tolist") and hasattr(value, "shape") else 1
        has_fields = getattr(getattr(value, "dtype", None), "names", None) is not None
        if dimensions == 1 and not has_fields:
            items: Iterable[Any] = value.tolist() if hasattr(value, "tolist") else iter(value)
            return items
    # Whatever somebody's type raises where it is no sequence after all.
    except Exception as error:
        raise RequestError(name, value, expected, is_mistyped=True) from error
    shape = "without fields" if has_fields else f"in one dimension, not in {dimensions}"
    raise RequestError(name, value, f"{expected}; {shape}", is_mistyped=True)


def _encodable(given: str, name: str) -> str:
    if not is_text(given):
        # What is in it is none of a log's business.
        raise RequestError(name, f"{len(given):,} characters", "text that UTF-8 can encode")
    return given


def params_of_each(sampling_params: object, count: int) -> list[SamplingParams]:
    """The params of each of so many prompts.

    Raises:
        RequestError: they are none, or not as many.
    """
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    expected = "a SamplingParams, or one for each prompt"
    if not is_several(sampling_params):
        raise RequestError("sampling_params", sampling_params, expected, is_mistyped=True)
    listed = list(sampling_params)
    for index, params in enumerate(listed):
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params[{index}]", params, "a SamplingParams", is_mistyped=True)
    if len(listed) != count:
        raise RequestError("sampling_params", listed, f"one for each of the {count} prompts")
    return listed
