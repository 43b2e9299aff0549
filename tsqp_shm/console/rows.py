"""Lines of a report: a label and what there is to say, at the width of the terminal that they go to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from tsqp_shm.wrapping import columns_of, wrapped

# A terminal that is narrower has no room for what is said beside its label.
_LEAST_COLUMNS = 50


def print_rows(rows: Sequence[tuple[str, str]], out: TextIO) -> None:
    columns = columns_of(out)
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        if columns is None:
            lines = [f"{label:>{width}}  {text}"]
        elif columns < _LEAST_COLUMNS:
            lines = wrapped(f"{label}: {text}", columns, indent=2)
        else:
            lines = wrapped(f"{label:>{width}}  {text}", columns, indent=width + 2)
        print("\n".join(lines), file=out)
    out.flush()
