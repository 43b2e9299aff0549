"""Kernels of one instruction set, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tsqp_shm import _native


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _native.active_instruction_set()
    _native.use_instruction_set(name)
    try:
        yield
    finally:
        _native.use_instruction_set(before)
