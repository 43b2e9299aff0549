"""The words of this process's own command line: read, and then no longer to be read by others."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from tsqp_shm.roles.private_arguments import handed_over

# Of `python -m tsqp_shm launch MODEL --prompt ...` what stays to be seen.
_SEEN_WORDS = 2


def take_arguments() -> list[str]:
    """The arguments of this process, and those that its parent has handed over.

    Its command line is blanked behind the verb and the model: every user of the machine can read it, and it may hold a
    prompt. It was there for the moment before, and its length stays; all of it where the system allows no blanking.
    """
    arguments = sys.argv[1:]
    seen = 0
    while seen < min(_SEEN_WORDS, len(arguments)) and not arguments[seen].startswith("-"):
        seen += 1
    with contextlib.suppress(OSError, ValueError, IndexError):
        _blank(num_last_words=len(arguments) - seen)
    return arguments + handed_over()


def _blank(num_last_words: int) -> None:
    # Behind the name, which is in parentheses and may hold anything, the 46th and 47th: arg_start and arg_end.
    fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
        memory.seek(start)
        words = memory.read(end - start).split(b"\0")[:-1]
        # SAFETY: the words are the ones that this process was started with, and Python has copied them.
        if words != [os.fsencode(word) for word in sys.orig_argv]:
            return
        size_bytes = sum(len(word) + 1 for word in words[len(words) - num_last_words :])
        memory.seek(end - size_bytes)
        memory.write(bytes(size_bytes))
