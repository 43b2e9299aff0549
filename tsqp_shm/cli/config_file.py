"""Flags in a file: the part of YAML that flags need, and nothing that could name a type or refer to another place."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tsqp_shm.errors import ConfigError

_LINE = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)\s*:(?:\s+(.*))?")
_ITEM = re.compile(r"\s*-\s+(.*)")
# Of flags that may be repeated.
_LISTS = ("api_keys", "allowed_origins")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None, "~": None}


def apply_config(path: Path, arguments: argparse.Namespace) -> None:
    """Fills flags that were not given with those of a file: `name: value` lines, lists as `[a, b]` or `- a` lines.

    Raises:
        ConfigError: the file cannot be read, a line is none of these, or there is no such flag.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError("config", str(path), f"a readable file ({reason})") from None
    for name, value in _read(path, lines).items():
        field = _field(name, arguments)
        if field is None:
            raise ConfigError(f"{path}: {name}", value, "a flag of this command, without its dashes")
        value = _as_flag(f"{path}: {name}", value, is_list=field in _LISTS)
        # Not by equality: 0 is given.
        if getattr(arguments, field) is None or getattr(arguments, field) is False:
            setattr(arguments, field, value)


def _as_flag(name: str, value: Any, *, is_list: bool) -> Any:
    """A value as the flag's own parser would give it.

    Raises:
        ConfigError: it is none: of keys above all, a wrong one must not be taken for others, or for none.
    """
    if not is_list:
        if isinstance(value, list) or value is None:
            raise ConfigError(name, value, "one value")
        return value
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(each, str) and each for each in listed):
        raise ConfigError(name, "a list" if isinstance(value, list) else value, "a string, or strings; quote numbers")
    return listed


def _field(name: str, arguments: argparse.Namespace) -> str | None:
    name = name.replace("-", "_")
    names = {"api_key": "api_keys", "timeout": "timeout_s"}
    name = names.get(name, name)
    return name if name in vars(arguments) and name not in ("config", "run") else None


def _read(path: Path, lines: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    last: str | None = None
    for number, line in enumerate(lines, 1):
        stripped = _without_comment(line).rstrip()
        if not stripped or stripped == "---":
            continue
        item = _ITEM.fullmatch(stripped)
        if item and last is not None and isinstance(found[last], list):
            found[last].append(_scalar(item[1]))
            continue
        match = _LINE.fullmatch(stripped)
        if match is None:
            raise ConfigError(f"{path}: line {number}", stripped, "`name: value`, or `- item` under a name")
        last = match[1]
        if last in found:
            raise ConfigError(f"{path}: line {number}", last, "each name once")
        found[last] = [] if match[2] is None else _value(match[2].strip())
    return found


def _without_comment(line: str) -> str:
    """A `#` begins one at the line's start or behind a space, and not within quotes."""
    quote = ""
    for place, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (place == 0 or line[place - 1].isspace()):
            return line[:place]
    return line


def _value(words: str) -> Any:
    if words.startswith("[") and words.endswith("]"):
        inside = words[1:-1].strip()
        return [_scalar(each.strip()) for each in inside.split(",")] if inside else []
    return _scalar(words)


def _scalar(words: str) -> Any:
    if words[:1] == words[-1:] == '"' and len(words) > 1:
        try:
            return json.loads(words)
        except ValueError:
            return words[1:-1]
    if words[:1] == words[-1:] == "'" and len(words) > 1:
        return words[1:-1].replace("''", "'")
    if words.lower() in _WORDS:
        return _WORDS[words.lower()]
    for kind in (int, float):
        try:
            return kind(words)
        except ValueError:
            continue
    return words
