"""The command line of a script: its docstring is the help, wrapped to the terminal; a wrong flag is one line.

It needs nothing but Python, so that a script can answer before anything is built.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any, NoReturn

USAGE_ERROR = 2


class _Help(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves what is indented as it is: commands, and lists of two columns."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(
            paragraph if paragraph.startswith(" ") else textwrap.fill(" ".join(paragraph.split()), width)
            for paragraph in paragraphs
        )


class ScriptParser(argparse.ArgumentParser):
    """
    Args:
        description: the script's `__doc__`.
    """

    def __init__(self, description: str | None, **settings: Any) -> None:
        settings.setdefault("prog", f"scripts/{Path(sys.argv[0]).name}")
        super().__init__(description=description, formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def positive(text: str) -> int:
    """A whole number, 1 or more.

    Raises:
        ValueError: it is none.
    """
    number = int(text)
    if number < 1:
        raise ValueError
    return number


# argparse names the type in the line for a value that is none.
positive.__name__ = "positive whole number"


def linear_shape(text: str) -> str:
    """As it is, where it is one.

    Raises:
        ValueError: it is none.
    """
    outputs, _, inputs = text.partition("x")
    positive(outputs)
    positive(inputs)
    return text


linear_shape.__name__ = "OUTPUTSxINPUTS"
