"""The fuzz targets on their seeds and on the committed corpus: what once reached something new still passes.

`scripts/fuzz` looks for new ones; the native targets run their corpus there, under the sanitizers.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz import border, kernels

from tsqp_shm import _native

CORPUS = Path(border.__file__).parent / "corpus"
TARGETS = {**border.TARGETS, "kernels": kernels.kernels}


@pytest.fixture(autouse=True)
def instruction_set() -> Iterator[None]:
    """The inputs for the kernels choose one, in this process."""
    chosen = _native.active_instruction_set()
    yield
    _native.use_instruction_set(chosen)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_passes_on_its_corpus(name):
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        TARGETS[name](path.read_bytes())


@pytest.mark.parametrize("name", border.TARGETS)
def test_a_target_passes_on_its_seeds(name):
    for seed in border.seeds()[name].values():
        border.TARGETS[name](seed)


def test_a_target_fails_where_a_check_is_gone(monkeypatch):
    """Else it would find nothing."""
    monkeypatch.setattr(border.SubmissionRules, "check", lambda rules, record: None)
    broken = bytearray(border.seeds()["submission"]["every-opcode"])
    broken[0] = 2
    with pytest.raises(AssertionError):
        border.submission(bytes(broken))
