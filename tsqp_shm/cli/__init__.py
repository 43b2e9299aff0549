"""`tsqp-shm VERB [MODEL] [flags]`: what a user types. Flags and defaults come from `config` and `SamplingParams`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from tsqp_shm.cli.verbs import build_parser
from tsqp_shm.errors import LimitError, TsqpError
from tsqp_shm.roles.lifeline import Lifeline
from tsqp_shm.roles.process import ERROR_PREFIX

# What the system may run out of at any moment; everything else that it refuses is a bug here.
EXHAUSTED = {
    errno.ENOSPC: "disk space",
    errno.EDQUOT: "disk space",
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.ENOMEM: "memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    lifeline = Lifeline.from_environment()
    _end_by_signals()
    # A parent that is gone, or that asks this process to end, is the same as a polite signal.
    lifeline.on_parent_gone(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        code: int = arguments.run(arguments, lifeline)
    except TsqpError as error:
        lifeline.failed(error)
        return _explain(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of stdout has gone; there is nobody to tell, and Python must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in EXHAUSTED:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _explain(LimitError(EXHAUSTED[error.errno], f"{where}{error.strerror}"))
    return code


def _explain(error: TsqpError) -> int:
    # UNTRUSTED: an error may quote another process or a file, and must not steer the terminal.
    message = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(error))
    # The last words of another process end in a line of their own.
    gap = "\n" if "\n" in message else " "
    print(f"{ERROR_PREFIX}{message}{gap}{error.hint()}".rstrip(), file=sys.stderr)
    return error.exit_code


def _end_by_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup has SIGHUP ignored, and a signal that is ignored stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit_by_signal)
    # A parent's thread that has signals blocked may have started this process, and the mask is inherited.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    sys.unraisablehook = _exit_later


def _exit_later(ignored: sys.UnraisableHookArgs) -> None:
    """Sends a signal again whose SystemExit Python dropped, because the handler ran inside a finaliser: the sender of
    the signal sends it only once."""
    if isinstance(ignored.exc_value, SystemExit) and isinstance(ignored.exc_value.code, int):
        threading.Timer(0.05, os.kill, (os.getpid(), ignored.exc_value.code - 128)).start()
    else:
        sys.__unraisablehook__(ignored)


def _exit_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
