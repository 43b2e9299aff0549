"""What is read, and what is asked, to see how good a column is."""

from __future__ import annotations

from pathlib import Path

import tsqp_shm
from tsqp_shm.errors import ConfigError

_ROOT = Path(tsqp_shm.__file__).parent.parent
# Prose of another's making, and prose of ours with tables and code.
TEXTS = ("LICENSE", "docs/architecture.md")
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 7 plus 5?",
    "Name three colours.",
    "Why is the sky blue?",
    "Translate to French: good morning.",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "Give me a short recipe for pancakes.",
    "What is a prime number?",
    "Write a haiku about winter.",
    "How do I boil an egg?",
    "What is the opposite of hot?",
    "List the planets nearest to the sun.",
    "Explain in one sentence what a computer does.",
    "What should I pack for a day at the beach?",
    "How many legs does a spider have?",
    "What is the largest ocean?",
    "Tell me something about elephants.",
    "Is the moon larger than the earth?",
)
# Of a file of them.
_MAX_FILE_BYTES = 1 << 20


def read_questions(file: str | None) -> tuple[str, ...]:
    """Those of a file, one a line; without one, those above.

    Raises:
        ConfigError: it cannot be read, or has none.
    """
    if file is None:
        return QUESTIONS
    try:
        with Path(file).open(encoding="utf-8") as lines:
            found = tuple(dict.fromkeys(line.strip() for line in lines.read(_MAX_FILE_BYTES).splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("questions", file, "a text file with one question a line") from error
    questions = tuple(filter(None, found))
    if not questions:
        raise ConfigError("questions", file, "a text file with one question a line")
    return questions


def read_texts() -> dict[str, str]:
    """Raises:
    ConfigError: they are not there, as this is no checkout.
    """
    found = {}
    for name in TEXTS:
        try:
            found[name] = (_ROOT / name).read_text()
        except OSError as error:
            raise ConfigError("quality", str(_ROOT / name), "a checkout of the repository to run from") from error
    return found
