"""What one request asks, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tsqp_shm.bench.serve.events import AnswerReader, BrokenAnswer

_DONE = b"[DONE]"


@dataclass(frozen=True)
class Request:
    """One stream of a completion.

    Attributes:
        number: of its run, from 0; no two have one prompt.
        new_tokens: so many are asked for.
        temperature: 0 takes the likeliest token.
    """

    number: int
    prompt: str
    new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Asked:
    """Attributes:
    failure: why there is no whole answer, or "".
    prompt_tokens, tokens: as the server counts them in its usage.
    first_s: from the moment before its connection was made to the first text.
    gaps_s: between each piece of text and the next; a server may put several tokens into a piece.
    """

    failure: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    first_s: float = 0.0
    gaps_s: tuple[float, ...] = ()


def read_answer(began_s: float, pieces: Sequence[tuple[float, bytes]]) -> Asked:
    """From what came of a connection, and when.

    Args:
        pieces: the time of each, in seconds, and its bytes.
    """
    reader = AnswerReader()
    texts_s: list[float] = []
    usage: Mapping[str, Any] | None = None
    is_done = False
    try:
        for arrived_s, data in pieces:
            for content in reader.push(data):
                if content == _DONE:
                    is_done = True
                    continue
                event = json.loads(content)
                if not isinstance(event, dict) or "error" in event:
                    return Asked(f"an error in the stream: {content[:200]!r}")
                if any(choice.get("text") for choice in event.get("choices", ())):
                    texts_s.append(arrived_s)
                usage = event.get("usage") or usage
    except (BrokenAnswer, ValueError, AttributeError) as error:
        return Asked(str(error) or type(error).__name__)
    if reader.status != 200:
        return Asked(f"status {reader.status}: {reader.body[:200]!r}" if reader.status else "no answer")
    if usage is None or not texts_s or not (is_done or reader.is_whole):
        return Asked("a stream that ends before its end")
    gaps_s = tuple(later - earlier for earlier, later in pairwise(texts_s))
    return Asked("", usage["prompt_tokens"], usage["completion_tokens"], texts_s[0] - began_s, gaps_s)
