"""Functions of a caller's, as the threads of an `LLM` may have them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def harmless(report: Callable[[str], None]) -> Callable[[str], None]:
    """What a caller's function raises is the caller's affair: it must not end a thread that it is told things on."""

    def say(line: str) -> None:
        with suppress(Exception):
            report(line)

    return say


def while_held(function: Callable[..., Any]) -> Callable[..., Any]:
    """A caller's function as an LLM's threads may have it: it may be a method of who holds the LLM, and a thread that
    held it would hold the LLM too, for ever. When nobody holds it any more, it does nothing."""
    try:
        reference = weakref.ref(function)
    except TypeError:
        # Of a type that allows no such references.
        return function

    def call(*arguments: object) -> Any:
        held = reference()
        return None if held is None else held(*arguments)

    return call
