"""What was asked for: from parsed flags to settings, a model folder and a prompt."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsqp_shm.cli.flags import DEFAULT_PROMPT, DEFAULT_QUESTION
from tsqp_shm.cli.parser import Parser
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import ConfigError
from tsqp_shm.printable import is_text

# Longer than any model's longest prompt.
MAX_PROMPT_BYTES = 1 << 26


@contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Lets Ctrl-C, and what ends this process, wait while modules load: numpy would take it for a broken installation.

    A launch starts the TEE process with Ctrl-C blocked, for the time before this.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # By a handler, as any thread may get it, and the handler runs in this one.
    came: list[int] = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if came:
            os.kill(os.getpid(), signal.SIGTERM)


def reporter(arguments: argparse.Namespace) -> Callable[[str], None]:
    def report(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    return report


def model_folder(arguments: argparse.Namespace) -> Path:
    from tsqp_shm.model_folder import find_model_folder

    return find_model_folder(arguments.model, report=reporter(arguments))


def prompt_text(arguments: argparse.Namespace) -> str:
    """Raises:
    ConfigError: it cannot be read, is no UTF-8 text, or is longer than any model takes.
    """
    path = arguments.prompt_file
    if path is None:
        default = DEFAULT_QUESTION if arguments.chat else DEFAULT_PROMPT
        return default if arguments.prompt is None else str(arguments.prompt)
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if path == "-" else stack.enter_context(Path(path).open("rb"))
            data = file.read(MAX_PROMPT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError("prompt-file", path, f"a readable text file ({reason})") from None
    if len(data) > MAX_PROMPT_BYTES:
        raise ConfigError("prompt-file", path, f"at most {MAX_PROMPT_BYTES:,} bytes")
    try:
        return decoded(data)
    except ValueError as error:
        raise ConfigError("prompt-file", path, f"UTF-8 text ({error})") from None


def decoded(data: bytes) -> str:
    """UTF-8 text as editors and pipes make it: without the byte order mark, and with newlines as line ends.

    Raises:
        ValueError: it is none, with the reason.
    """
    # The longer ones first: UTF-32's begins with UTF-16's.
    for mark, encoding in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
                           (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):  # fmt: skip
        if data.startswith(mark):
            raise ValueError(f"its byte order mark is that of {encoding}")
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is {data[error.start]:#04x}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def require_sane(arguments: argparse.Namespace) -> None:
    """Raises:
    ConfigError: flags that cannot go together, or sampling values that are not allowed; before any work.
    """
    if arguments.prompt is not None:
        arguments.prompt = _as_typed("prompt", arguments.prompt)
    if arguments.system is not None:
        arguments.system = _as_typed("system", arguments.system)
        if not arguments.chat and not arguments.interactive:
            # The value is not repeated: it is none of a log's business.
            raise ConfigError("system", "a message", "--chat or --interactive beside it")
    if arguments.keep_history and not arguments.interactive:
        raise ConfigError("keep-history", True, "--interactive beside it, as nothing is typed otherwise")
    for name in ("stop", "bad_words"):
        texts = getattr(arguments, name)
        if texts is not None:
            setattr(arguments, name, [_as_typed(name.replace("_", "-"), text) for text in texts])
    sampling_params(arguments)
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise ConfigError("prompt-file", arguments.prompt_file, "either --prompt or --prompt-file")
    if arguments.interactive and arguments.json:
        raise ConfigError("json", True, "no --json together with --interactive")
    if arguments.interactive and (arguments.prompt is not None or arguments.prompt_file is not None):
        raise ConfigError("interactive", True, "no --prompt and no --prompt-file, as it asks for prompts")


def _as_typed(flag: str, text: str) -> str:
    """Text of the command line; where the locale did not understand its bytes, they may be UTF-8 all the same."""
    if is_text(text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        # The value is not repeated: it may be long, and is none of a log's business.
        raise ConfigError(flag, "bytes that are no UTF-8", "UTF-8 text") from None


def sampling_params(arguments: argparse.Namespace, defaults: Any = None) -> Any:
    """What was given, over `defaults`; None: those of a model that says nothing."""
    from tsqp_shm.tee.sampling_params import UNASKED, SamplingParams

    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in SamplingParams.__dataclass_fields__ and _is_given(value)
    }
    return replace(defaults or UNASKED, **given)


def wanted(arguments: argparse.Namespace) -> Any:
    """What is to be done in a session, as a `console.run.Wanted`; the prompt is read.

    Raises:
        ConfigError: as `prompt_text`.
    """
    from tsqp_shm.console.run import Wanted
    from tsqp_shm.console.typed import default_history_file

    return Wanted(
        prompt=None if arguments.interactive else prompt_text(arguments),
        is_chat=arguments.chat or arguments.interactive,
        system=arguments.system,
        history_file=default_history_file() if arguments.keep_history else None,
        as_json=arguments.json,
        is_quiet=arguments.quiet,
        is_verbose=arguments.verbose,
    )


def answer_params(arguments: argparse.Namespace, llm: Any) -> Any:
    """What was given, over what the model's folder says. An answer of a chat goes on to its end, unless a flag says
    otherwise; a text that is completed has none."""
    defaults = llm.get_default_sampling_params()
    is_chat = arguments.chat or arguments.interactive
    return sampling_params(arguments, replace(defaults, max_tokens=None) if is_chat else defaults)


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig.from_environment(
        {name: value for name, value in vars(arguments).items() if name in EngineConfig.__dataclass_fields__}
    )


def given(arguments: argparse.Namespace, *parsers: Parser) -> list[str]:
    """The flags of `parsers` that the user gave, as arguments again. MODEL and --session are the caller's to add."""
    words: list[str] = []
    for action in (action for parser in parsers for action in parser._actions):
        value = getattr(arguments, action.dest, None)
        if not action.option_strings or action.dest == "session":
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            # Its names are those of yes and of no.
            words += [] if value is None else [action.option_strings[not value]]
        elif _is_given(value):
            for item in value if isinstance(value, list) else [value]:
                words.append(action.option_strings[-1] if item is True else f"{action.option_strings[-1]}={item}")
    return words


def _is_given(value: object) -> bool:
    # Not `in (None, False)`: 0 equals False, and --seed 0 is a seed.
    return value is not None and value is not False
