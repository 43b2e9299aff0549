"""Lines of a report: a label each, and what there is to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from tsqp_shm.wrapping import beside


def print_rows(rows: Sequence[tuple[str, str]], out: TextIO) -> None:
    width = max(len(label) for label, _ in rows)
    lines = [beside(f"{label:>{width}}  ", text, out) + "\n" for label, text in rows]
    # At once: another process may write to the same terminal.
    out.write("".join(lines))
    out.flush()
