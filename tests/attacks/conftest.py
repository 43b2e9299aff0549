"""Attacks use what plays a hostile GPU process, and the reader of `scripts/read_arena.py`."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS / "hostile"), str(_TESTS.parent / "scripts")]
