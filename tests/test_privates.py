"""What stands behind a front is its own: nobody else reaches into it, so that it can be taken apart."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tests", "scripts", "tsqp_shm/bench")
# `self._engine = engine` is a class's own affair, a private attribute of an engine is not.
REACHES_IN = re.compile(r"\b\w*(llm|runtime|stepper|doorbell|engine|connection)\._(?!_)[a-z]\w*", re.IGNORECASE)
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and "corpus" not in path.parts and path.suffix in ("", ".py")
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_reaches_behind_a_front(path):
    found = [match.group() for match in REACHES_IN.finditer(path.read_text())]
    assert not found
