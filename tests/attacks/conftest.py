"""Attacks use what plays a hostile GPU process, and the reader of `scripts/read_arena.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS / "hostile"), str(_TESTS.parent / "scripts")]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """What is small is done sooner by one thread than by several that wait for each other on a busy machine."""
    import torch

    torch.set_num_threads(1)
