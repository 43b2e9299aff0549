"""The standard streams of a command: there, whatever its caller has closed, and fit for what is said on them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from tsqp_shm.errors import TsqpError
from tsqp_shm.printable import ShownStream


class AnswerStream(io.TextIOWrapper):
    """Standard output: what cannot be written there is an error, and not to be lost."""

    def write(self, text: str, /) -> int:
        with _refusals():
            return super().write(text)

    def flush(self) -> None:
        with _refusals():
            super().flush()


class ReportStream(io.TextIOWrapper):
    """Standard error: that nobody can be told something there ends no work."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


class ShownAnswerStream(ShownStream, AnswerStream):
    """Standard output where it is a terminal."""


class ShownReportStream(ShownStream, ReportStream):
    """Standard error where it is a terminal."""


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TsqpError(f"standard output cannot be written: {error.strerror}") from error


def open_standard_streams() -> None:
    """Makes this process's standard streams what a command needs; first of all, as whatever is opened before may take
    the place of one that is closed.

    A closed one is the null device. A terminal shows what does not print, and a character that an encoding lacks is
    spelled out; bytes that an encoding does not have come in as lone surrogates, to be refused by who reads them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(errors="surrogateescape")
    streams = {
        "stdin": stdin,
        "stdout": _opened(sys.stdout, 1, AnswerStream, ShownAnswerStream),
        "stderr": _opened(sys.stderr, 2, ReportStream, ShownReportStream),
    }
    for name, stream in streams.items():
        # Those of the second name are what Python began with, and of no use any more.
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def discard_output() -> None:
    """What is buffered for standard output goes nowhere: there is nobody to take it, and Python would try at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _opened(
    stream: TextIO | None, descriptor: int, plain: type[io.TextIOWrapper], shown: type[io.TextIOWrapper]
) -> TextIO:
    stream = stream or open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    settings = {name: getattr(stream, name) for name in ("encoding", "line_buffering", "write_through")}
    make = shown if stream.isatty() else plain
    return make(stream.detach(), errors="backslashreplace", **settings)
