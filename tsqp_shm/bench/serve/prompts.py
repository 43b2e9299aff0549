"""Prompts of a given length, no two of which begin alike: a server may keep what it has computed."""

from __future__ import annotations

import random
from pathlib import Path

from tsqp_shm.bench.serve.asked import Request
from tsqp_shm.errors import ConfigError
from tsqp_shm.model.tokenizer import TOKENIZER_FILE, Tokenizer

_WORDS = [
    "the", "a", "one", "this", "every", "water", "stone", "river", "house", "night", "morning", "small", "old", "long",
    "warm", "city", "road", "letter", "song", "bird", "tree", "field", "winter", "summer", "paper", "table", "music",
    "garden", "mountain", "science", "number", "engine", "question", "answer", "story", "teacher", "doctor", "child",
    "friend", "market", "season", "color", "bread", "glass", "light", "shadow", "window", "between", "under", "without",
    "because", "before", "after", "always", "never", "often", "slowly", "quickly", "walks", "reads", "writes", "finds",
]  # fmt: skip
# Tokens of the words that name a prompt, in front of the others.
MIN_TOKENS = 16


class Prompts:
    """Of one model's tokenizer; close it."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        ConfigError: the model has no tokenizer.
        """
        if not (folder / TOKENIZER_FILE).is_file():
            raise ConfigError("model", folder, "a model with a tokenizer, as servers are asked in text")
        self._tokenizer = Tokenizer.from_folder(folder)

    def close(self) -> None:
        self._tokenizer.close()

    def requests(self, run: int, first: int, count: int, tokens: int, new: int, temperature: float) -> list[Request]:
        """The same for the same arguments.

        Args:
            run, first: what no other prompt of the same benchmark has both of.
            tokens: of each prompt.
        """
        numbers = range(first, first + count)
        return [Request(number, self._prompt(run, number, tokens), new, temperature) for number in numbers]

    def _prompt(self, run: int, number: int, tokens: int) -> str:
        drawn = random.Random(f"{run} {number}")
        # Words of one token are the rule, so this is enough.
        words = f"{number} {run}: " + " ".join(drawn.choice(_WORDS) for _ in range(tokens))
        special = len(self._tokenizer.encode(""))
        ids = self._tokenizer.encode(words, add_special_tokens=False)
        return self._tokenizer.decode(ids[: max(1, tokens - special)])
