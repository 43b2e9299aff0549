"""Arguments that callers hand in: names that a function does not have, and files that results are to go to."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path

from tsqp_shm.errors import ConfigError

# In place of a file's name.
STDOUT = "-"


def require_writable(flag: str, file: str | None) -> None:
    """Before any work.

    Raises:
        ConfigError: the folder that the file is to lie in does not exist, or a folder has its name.
    """
    if file is not None and file != STDOUT:
        path = Path(file).absolute()
        if not path.parent.is_dir() or path.is_dir():
            raise ConfigError(flag, file, "a file in a folder that exists")


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
