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

from tsqp_shm.cli.command_line import take_arguments
from tsqp_shm.cli.streams import discard_output, open_standard_streams
from tsqp_shm.cli.verbs import build_parser
from tsqp_shm.errors import ContenderFailed, LimitError, PeerDied, TsqpError
from tsqp_shm.printable import shown
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
    """Runs one command. Returns the exit code.

    Args:
        argv: its words; None for those that this process was started with, whose standard streams and command line are
            its own then.
    """
    is_own = argv is None
    if is_own:
        open_standard_streams()
    try:
        argv = take_arguments() if argv is None else argv
        lifeline = Lifeline.from_environment()
        try:
            return _run(argv, lifeline)
        except TsqpError as error:
            lifeline.failed(error)
            raise
        finally:
            # What is buffered still may not be written either.
            sys.stdout.flush()
    except TsqpError as error:
        if is_own:
            discard_output()
        return _explain(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of stdout has gone; there is nobody to tell.
        discard_output()
        return 128 + signal.SIGPIPE


def _run(argv: Sequence[str], lifeline: Lifeline) -> int:
    arguments = build_parser().parse_args(argv)
    _end_by_signals(has_parent=lifeline.has_parent)
    # A parent that is gone, or that asks this process to end, is the same as a polite signal.
    lifeline.on_parent_gone(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        code: int = arguments.run(arguments, lifeline)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in EXHAUSTED:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise LimitError(EXHAUSTED[error.errno], f"{where}{error.strerror}") from error
    return code


def _explain(error: TsqpError) -> int:
    # UNTRUSTED: an error may quote another process or a file, and must neither steer the terminal nor look like two.
    # The last words of another process alone are lines.
    message = shown(str(error), lines=isinstance(error, (PeerDied, ContenderFailed)))
    # They end in a line of their own.
    gap = "\n" if "\n" in message else " "
    print(f"{ERROR_PREFIX}{message}{gap}{error.hint()}".rstrip(), file=sys.stderr)
    return error.exit_code


def _end_by_signals(*, has_parent: bool) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        # nohup has SIGHUP ignored, and a signal that is ignored stays so; but by SIGTERM a parent ends this process.
        if signal.getsignal(number) is not signal.SIG_IGN or (has_parent and number == signal.SIGTERM):
            signal.signal(number, _exit_by_signal)
    # A parent's thread that has signals blocked may have started this process, and the mask is inherited.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
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
