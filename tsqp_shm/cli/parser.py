"""The parser of every verb: a wrong flag is one line, and what is seldom wanted does not bury what is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from tsqp_shm.errors import ConfigError
from tsqp_shm.roles.process import ERROR_PREFIX
from tsqp_shm.wrapping import wrapped

# A terminal as narrow as this has the text of a flag on the lines below it.
_NARROW_COLUMNS = 60


class Parser(argparse.ArgumentParser):
    """Where `put_first` was called, `--help` shows those flags alone and `--help-all` the others after them; elsewhere
    `--help` shows all."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": HelpFormatter, **settings})
        self._first: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """A wrong flag gets one line; the usage of all the others would bury it."""
        self.exit(ConfigError.exit_code, f"{ERROR_PREFIX}{message}; see {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; what is unknown is told by the verb that was asked for, whose help has the right names."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            prog = getattr(parsed, "prog", self.prog)
            words = " ".join(unknown)
            self.exit(ConfigError.exit_code, f"{ERROR_PREFIX}unrecognized arguments: {words}; see {prog} --help\n")
        return parsed

    def put_first(self, names: Sequence[str]) -> None:
        """Has help begin with these flags, in this order; those that the parser does not have are passed over."""
        self._first = names
        self.add_argument("--help-all", action=_HelpAll, help="show every flag")

    def format_help(self) -> str:
        return self._formatted_help(shows_all=False) if self._first else super().format_help()

    def format_help_all(self) -> str:
        return self._formatted_help(shows_all=True)

    def _formatted_help(self, *, shows_all: bool) -> str:
        first, others = self._first_and_others()
        formatter = HelpFormatter(self.prog)
        places = [action for action in self._actions if not action.option_strings]
        formatter.add_usage(f"%(prog)s [flags] {formatter.places(places)}", [], [])
        formatter.add_text(self.description)
        for title, text, actions in [("common flags", None, first), *(others if shows_all else [])]:
            formatter.start_section(title)
            formatter.add_text(text)
            formatter.add_arguments(actions)
            formatter.end_section()
        count = sum(len(actions) for _, _, actions in others)
        if not shows_all:
            formatter.add_text(f"{self.prog} --help-all shows {count} more.")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _first_and_others(
        self,
    ) -> tuple[list[argparse.Action], list[tuple[str | None, str | None, list[argparse.Action]]]]:
        """The flags that come first, and the rest in their groups: title, text, flags."""
        named = {name: action for action in self._actions for name in action.option_strings or [action.dest]}
        first = [named[name] for name in (*self._first, "--help-all", "--help") if name in named]
        others = []
        for group in self._action_groups:
            actions = [action for action in group._group_actions if action not in first]
            if actions:
                title = "others" if group.title == "options" else group.title
                others.append((title, group.description, actions))
        return first, others


class HelpFormatter(argparse.HelpFormatter):
    """Breaks lines between words; of descriptions and what follows the flags each line is a paragraph."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **settings)
        if self._width < _NARROW_COLUMNS:
            self._max_help_position = 6

    def places(self, actions: Sequence[argparse.Action]) -> str:
        """Of the usage, what is no flag."""
        return " ".join(self._format_args(action, action.dest) for action in actions)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for line in text.rstrip("\n").split("\n"):
            inner = len(line) - len(line.lstrip())
            lines += wrapped(line, width + 1, indent=inner + 4 if inner else 0)
        return "\n".join(indent + line for line in lines)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(" ".join(text.split()), width + 1)

    def format_help(self) -> str:
        lines = super().format_help().split("\n")
        return "\n".join(part for line in lines for part in wrapped(line, self._width + 1, indent=4))


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        assert isinstance(parser, Parser)
        print(parser.format_help_all(), end="")
        parser.exit()
