"""Lines that are typed into a chat: edited on a terminal, read as they are from anywhere else."""

from __future__ import annotations

import json
import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from tsqp_shm.errors import ConfigError
from tsqp_shm.files import open_own

PROMPT = "> "
_MOST_LINES = 1000
_MOST_BYTES = 1 << 24
_SETTINGS = (
    # What is pasted comes as one line, and not as a turn for each of its lines.
    "set enable-bracketed-paste on",
    # A locale without UTF-8 would take the bytes of a character for keys.
    "set input-meta on",
    "set output-meta on",
    "set convert-meta off",
)


class Typed:
    """Where lines come from.

    Args:
        history_file: keeps them beyond this process; None: they are in its memory alone.

    Attributes:
        is_terminal: whether a person types them.
    """

    def __init__(self, history_file: Path | None) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._editor = _line_editor()
        self._history_file = history_file if self.is_terminal else None

    def remember(self) -> None:
        """Takes up the lines of earlier chats.

        Raises:
            ConfigError: the file cannot be kept.
        """
        if self._history_file is None:
            return
        with _kept(self._history_file):
            self._history_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(self._open(os.O_RDWR), "r+b") as file:
                lines = file.read().splitlines(keepends=True)[-_MOST_LINES:]
                file.seek(0)
                file.truncate()
                file.writelines(lines)
            for line in lines:
                with suppress(ValueError):
                    if self._editor is not None:
                        self._editor.add_history(str(json.loads(line)))

    def ask(self) -> str | None:
        """The next line; None at the end of input."""
        prompt = PROMPT if self.is_terminal else ""
        if prompt and not sys.stdout.isatty():
            # What is answered goes elsewhere, and the prompt is none of it.
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        try:
            line = input(prompt) if self._editor is None else _edited(self._editor, prompt)
        except EOFError:
            if self.is_terminal:
                print(file=sys.stderr, flush=True)
            return None
        if self._history_file is not None and line.strip():
            with _kept(self._history_file), os.fdopen(self._open(os.O_WRONLY | os.O_APPEND), "wb") as file:
                file.write(json.dumps(line).encode() + b"\n")
        return line

    @contextmanager
    def unechoed(self) -> Iterator[None]:
        """What is typed for the next turn meanwhile is not shown in the middle of an answer, but where it is asked."""
        if self._editor is None:
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        self._set_echo([*before[:3], before[3] & ~termios.ECHO, *before[4:]])
        try:
            yield
        finally:
            self._set_echo(before)

    def _set_echo(self, attributes: list[Any]) -> None:
        # A terminal that is gone shows nothing.
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)

    @property
    def whereabouts(self) -> str:
        """Where what is typed is kept."""
        if self._history_file is not None:
            return f"What you type is kept in {self._history_file}."
        return "What you type is kept in memory, until the chat ends."

    @property
    def unfinished(self) -> str:
        """What was typed of a line that was interrupted, as far as that is known."""
        return "" if self._editor is None else str(self._editor.get_line_buffer())

    def _open(self, flags: int) -> int:
        assert self._history_file is not None
        return open_own(self._history_file, flags | os.O_CREAT, most_bytes=_MOST_BYTES)


class _Resumed(BaseException):
    """The process goes on after Ctrl-Z."""


def _edited(editor: ModuleType, prompt: str) -> str:
    """A line that is edited. Where it is stopped in the middle, the shell takes the terminal back to what it was, and
    the line is begun again with what was typed of it."""
    is_asked = False

    def resume(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        if is_asked:
            is_asked = False
            raise _Resumed

    before = signal.signal(signal.SIGCONT, resume)
    typed = ""
    try:
        while True:
            editor.set_startup_hook(partial(editor.insert_text, typed))
            try:
                is_asked = True
                try:
                    return input(prompt)
                finally:
                    is_asked = False
            except _Resumed:
                typed = editor.get_line_buffer()
    finally:
        editor.set_startup_hook(None)
        signal.signal(signal.SIGCONT, before)


def default_history_file() -> Path:
    """Source: XDG Base Directory Specification, "user-specific state files"."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "tsqp-shm" / "history"


def _line_editor() -> ModuleType | None:
    """Readline, where both ends are a terminal and Python has it; `input` edits lines by it from then on."""
    # Not before it is known: it may write to a terminal's place what a terminal would obey.
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    try:
        import readline
    except ImportError:
        return None
    if "libedit" not in (readline.__doc__ or ""):
        for setting in _SETTINGS:
            readline.parse_and_bind(setting)
    readline.clear_history()
    return readline


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError("keep-history", str(path), f"a file of this user's ({error.strerror})") from error
