"""Arguments by names that a function does not have: one error that says what they are called here."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from tsqp_shm.errors import ConfigError


def refuse_unknown(
    given: Mapping[str, object],
    known: Collection[str],
    names_here: Mapping[str, str],
    error: type[ConfigError] = ConfigError,
) -> None:
    """A value that would change nothing is refused as well: who writes it counts on what it means.

    Args:
        names_here: what other libraries' arguments are called here.

    Raises:
        ConfigError: one of `given` is not in `known`.
    """
    for name, value in given.items():
        if name in known:
            continue
        if name in names_here:
            raise error(name, value, f"{names_here[name]}, as it is called here")
        near = difflib.get_close_matches(name, known, n=3) or [other for other in known if _words(name) & _words(other)]
        listed = f"near it: {', '.join(near)}" if near else f"there are {', '.join(known)}"
        raise error(name, value, f"none of this name; {listed}")


def _words(name: str) -> set[str]:
    return {word for word in name.split("_") if len(word) > 2}
