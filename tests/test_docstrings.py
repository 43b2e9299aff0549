"""Everything that the package exports says how it is used, by an example that does what it says."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tsqp_shm
from tsqp_shm import LLM, SamplingParams, errors, metrics
from tsqp_shm.text_tokenizer import TextTokenizer

EXPORTED = [getattr(tsqp_shm, name) for name in tsqp_shm.__all__ if name != "__version__"]
# And what these give out.
MORE = [TextTokenizer, metrics.Counter, metrics.Gauge, metrics.Histogram, errors.ConfigError, errors.RequestError]
# Those whose every method is for a reader of the package.
CALLED = (tsqp_shm.LLM, tsqp_shm.Conversation)


def examples() -> list[doctest.DocTest]:
    found = []
    for documented in (*EXPORTED, *MORE):
        finder = doctest.DocTestFinder(recurse=True, exclude_empty=True)
        found += [each for each in finder.find(documented, documented.__name__) if each.examples]
    # What the others use it closes.
    return sorted(found, key=lambda example: example.name == "LLM.close")


def members(documented: type) -> list[str]:
    """The public methods and properties of a class's own."""
    return [
        f"{documented.__name__}.{name}"
        for name, member in vars(documented).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    ]


def run(example: doctest.DocTest, **given: object) -> dict[str, Any]:
    """Runs it with these names. Returns those that there are at its end."""
    said: list[str] = []
    globs: dict[str, Any] = dict(given)
    example.globs = globs
    doctest.DocTestRunner().run(example, out=said.append, clear_globs=False)
    assert not said, "".join(said)
    return globs


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[LLM]:
    """What the example of the class makes; the others go on with it."""
    (example,) = [each for each in examples() if each.name == "LLM"]
    with run(example)["llm"] as llm:
        yield llm


@pytest.mark.parametrize(
    "example", [each for each in examples() if each.name != "LLM"], ids=lambda example: example.name
)
def test_an_example_does_what_it_says(llm, example):
    run(example, llm=llm, SamplingParams=SamplingParams)


def test_whatever_is_exported_has_an_example():
    having = {example.name for example in examples()}
    wanted = [documented.__name__ for documented in (*EXPORTED, *MORE)]
    wanted += [member for documented in CALLED for member in members(documented)]
    assert [name for name in wanted if name not in having] == []
