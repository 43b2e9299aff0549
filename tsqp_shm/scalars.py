"""Single values as callers have them: Python's own, and those of array libraries, none of which is imported for it."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard


def plain(value: Any) -> Any:
    """A number, flag or string of an array library, or an array without dimensions, as Python's own; anything else as
    it is."""
    if type(value) in (int, float, bool, str, type(None)):
        return value
    try:
        value = value.item() if tuple(value.shape) == () else value
    # Whatever somebody's type does where it has no such thing.
    except Exception:
        return value
    return value


def whole(value: Any) -> int | None:
    """A whole number, or None where it is of another type: True, 2.0 and "2" are none."""
    value = plain(value)
    if isinstance(value, bool):
        return None
    try:
        # Not `int(value)`: a subclass of int, an enumeration above all, would keep its own ways of being printed.
        return int(operator.index(value))
    except Exception:
        return None


def real(value: Any) -> float | None:
    """A number, possibly infinite or NaN, or None where it is of another type: True and "0.5" are none."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    number: Any = value
    try:
        return float(number)
    except OverflowError:
        # Beyond what a float holds.
        return math.inf if number > 0 else -math.inf
    except Exception:
        return None


def flag(value: Any) -> bool | None:
    """True or False, or None where it is of another type: 1 and "yes" are none."""
    value = plain(value)
    return value if isinstance(value, bool) else None


def is_several(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether these are values and not one: text is one, bytes are text to whoever has them, and of a mapping nobody
    can tell what is meant."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Mapping))


def text(value: Any) -> str | None:
    """A string, or None where it is of another type."""
    # A subclass, numpy's for one, would be pickled and printed in its own way.
    return str.__str__(value) if isinstance(value, str) else None


def path(value: Any) -> Path | None:
    """A path, or None where it can be none: it is of another type, empty, or has a NUL."""
    try:
        name = os.fsdecode(value)
    except Exception:
        return None
    return Path(name) if name and "\0" not in name else None
