"""Arguments that cross to a child in memory, and not on its command line: every user of the machine can read that.

They are in a file without a name, whose descriptor the child inherits. So they may be longer than the 128 KiB that the
kernel passes, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from tsqp_shm.descriptors import memory_file
from tsqp_shm.errors import ConfigError

ARGUMENTS_VARIABLE = "TSQP_SHM_ARGUMENTS"


def hand_over(arguments: Sequence[str]) -> int:
    """Returns a descriptor for the child to inherit, named to it by ARGUMENTS_VARIABLE; the caller closes its own."""
    return memory_file("tsqp-shm-arguments", json.dumps(list(arguments)).encode())


def handed_over() -> list[str]:
    """What the parent has handed over to this process; nothing where nobody has."""
    descriptor = os.environ.pop(ARGUMENTS_VARIABLE, None)
    if descriptor is None:
        return []
    try:
        with os.fdopen(int(descriptor), "rb") as file:
            return [str(argument) for argument in json.load(file)]
    # One at a time: no descriptor, a number that is none, no JSON, JSON that is no list.
    except (OSError, OverflowError, ValueError, TypeError):
        raise ConfigError(ARGUMENTS_VARIABLE, descriptor, "nothing, as a parent of this package sets it") from None
