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


def tokenizer_of(folder: Path) -> Tokenizer:
    """Raises:
    ConfigError: the model has none.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise ConfigError("model", folder, "a model with a tokenizer, as servers are asked in text")
    return Tokenizer.from_folder(folder)


def make_requests(
    tokenizer: Tokenizer, run: int, numbers: range, tokens: int, new_tokens: int, temperature: float
) -> list[Request]:
    """The same for the same arguments.

    Args:
        run, numbers: no other request of the same benchmark has both.
        tokens: of each prompt.
    """
    special = len(tokenizer.encode(""))
    requests = []
    for number in numbers:
        drawn = random.Random(f"{run} {number}")
        # A word has one token at least.
        words = f"{number} {run}: " + " ".join(drawn.choice(_WORDS) for _ in range(tokens))
        ids = tokenizer.encode(words, add_special_tokens=False)
        prompt = tokenizer.decode(ids[: max(1, tokens - special)])
        requests.append(Request(number, prompt, new_tokens, temperature))
    return requests
