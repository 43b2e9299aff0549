"""JSON objects that somebody else wrote: read whole from a file, and field by field with types and bounds.

A model folder comes from a download, so any shape must be expected: a wrong one ends in a `ModelFileError` or
a `ConfigError` that names the field, never in a TypeError further down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from tsqp_shm.errors import ConfigError, ModelFileError
from tsqp_shm.model.files import MAX_CONFIG_BYTES, ModelFiles, as_text, read_file
from tsqp_shm.printable import quoted

_MAX_INTEGER = 2**31 - 1
# Each token that a model says is compared with all of them.
_MAX_IDS = 1024
# Far beyond any real parameter and still finite when a formula squares it in float64.
_MAX_NUMBER = 1e30


def read_json_object(path: Path, most_bytes: int = MAX_CONFIG_BYTES) -> dict[str, object]:
    """Returns the JSON object in a file.

    Raises:
        ModelFileError: the file is missing, unreadable, no regular one, larger than allowed, or not a JSON object.
    """
    return _json_object(read_file(path, most_bytes), path)


def read_model_json(files: ModelFiles, name: str, most_bytes: int = MAX_CONFIG_BYTES) -> dict[str, object]:
    """The same of a file of a model folder that holds still.

    Raises:
        ModelFileError: as `read_json_object`, or the file has changed.
    """
    return _json_object(files.read(name, most_bytes), files.path(name))


def _json_object(content: bytes, path: Path) -> dict[str, object]:
    try:
        found = json.loads(as_text(content, path))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"not valid JSON: {quoted(error)}") from error
    if not isinstance(found, dict):
        raise ModelFileError(path, f"expected a JSON object, found {_kind(found)}")
    return found


class JsonFields:
    """Typed access to one JSON object; a getter raises `ConfigError` for a wrong type or size.

    A getter with a default returns it only where the field is absent: null is a value of its own, because
    transformers' config classes tell the two apart (a Mistral without `sliding_window` has one of 4096 keys,
    a Mistral with null has none).

    Args:
        fields: the object.
        prefix: where it sits in the file ("rope_scaling."), for messages.
    """

    def __init__(self, fields: Mapping[str, object], prefix: str = "") -> None:
        self._fields, self._prefix = fields, prefix

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def raw(self, name: str, default: object = None) -> object:
        return self._fields.get(name, default)

    def count(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = _MAX_INTEGER) -> int:
        """Returns an integer within bounds; the field must be present where no default is given."""
        value = self._fields.get(name, default)
        if not _is_integer(value) or not minimum <= value <= maximum:
            raise self._wrong(name, f"an integer from {minimum} to {maximum}")
        return value

    def optional_count(self, name: str, default: int | None = None, *, minimum: int = 1) -> int | None:
        if self._fields.get(name, default) is None:
            return None
        return self.count(name, default, minimum=minimum)

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        """Returns a finite number above `above`; the field must be present where no default is given."""
        value = self._fields.get(name, default)
        if not (_is_integer(value) or isinstance(value, float)) or not above < value <= _MAX_NUMBER:
            raise self._wrong(name, f"a number above {above:g}")
        return float(value)

    def optional_number(self, name: str, *, above: float = 0.0) -> float | None:
        return None if self._fields.get(name) is None else self.number(name, above=above)

    def flag(self, name: str, default: bool) -> bool:
        value = self._fields.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._fields.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def integers(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """Returns one integer or a list of them as a tuple; null is the empty one."""
        value = self._fields.get(name, default)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if len(values) > _MAX_IDS or not all(_is_integer(item) and 0 <= item <= _MAX_INTEGER for item in values):
            raise self._wrong(name, f"a token id or a list of at most {_MAX_IDS} token ids")
        return tuple(values)

    def nested(self, name: str) -> JsonFields | None:
        """Returns the object in a field, or None where it is absent, null or empty."""
        value = self._fields.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object")
        return JsonFields(value, f"{self._prefix}{name}.")

    def path(self, name: str) -> str:
        """Returns the field's name as it is found from the top of the file."""
        return self._prefix + name

    def _wrong(self, name: str, expected: str) -> ConfigError:
        if name not in self._fields:
            expected += "; the field is missing"
        return ConfigError(self.path(name), brief(self._fields.get(name)), expected)


def brief(value: object) -> object:
    """Returns a value fit for one line of an error message: itself if it is small, else what kind it is."""
    if isinstance(value, str):
        return value if len(value) <= 80 else value[:77] + "..."
    # An integer of a million digits is as unprintable as a long list.
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**20):
        return value
    return _kind(value)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", int: "a huge integer", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
