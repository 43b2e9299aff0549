"""Runs one target of border.py under atheris: python instrumented.py TARGET [libFuzzer's arguments]"""

from __future__ import annotations

import shlex
import sys

import atheris

with atheris.instrument_imports(include=["tsqp_shm"]):
    import border

# libFuzzer gives its first argument to a shell where it starts itself again.
itself = shlex.join([sys.executable, *sys.argv[:2]])
atheris.Setup([itself, *sys.argv[2:]], border.TARGETS[sys.argv[1]])
atheris.Fuzz()
