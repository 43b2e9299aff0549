"""One request and its completion so far: tokens, text, and why it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from tsqp_shm.errors import RequestError
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.tee.ops import Float32
from tsqp_shm.tee.sampler import Sampler, SamplingParams


class Completion:
    """Grows token by token.

    Attributes:
        prompt_token_ids: what was asked.
        token_ids: what was answered so far, an ending token included.
        text: the answer so far; never half a character, never a part of a stop string.
        finish_reason: None, "stop" (end-of-sequence token or stop string), "length", "deadline" or "cancelled"; set
            when everything else is, as other threads look at it.
        cached: how many tokens of prompt and answer lie in the cache.
        started_s, first_token_s, ended_s: times on the monotonic clock, None until then.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        eos_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.prompt_token_ids = list(prompt_token_ids)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.cached = 0
        self.started_s = time.monotonic()
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self._has_begun = False
        self._sampler = Sampler(params)
        self._deadline_s = params.deadline_s
        self._stops = tuple(params.stop)
        self._max_tokens = max_tokens
        self._eos_token_ids = () if params.ignore_eos else tuple(eos_token_ids)
        self._stream = tokenizer.stream() if tokenizer else None
        self._held = ""

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.token_ids

    def uncached_token_ids(self, most: int) -> list[int]:
        """The tokens whose positions are not in the cache yet, at most so many."""
        return self.all_token_ids[self.cached : self.cached + most]

    def begin(self) -> None:
        """Says that it is run now, which it is once.

        Raises:
            RequestError: it was before.
        """
        if self._has_begun:
            raise RequestError("completion", "one that was run before", "a new one")
        self._has_begun = True

    def choose(self, logits: Float32) -> int:
        """The next token by logits [V]; it is not taken yet.

        Raises:
            ProtocolError: they are no numbers.
        """
        return self._sampler.sample(logits, self.all_token_ids)

    def grow(self, token_id: int) -> None:
        """Takes the next token."""
        now = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = now
        self.token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            self._end("stop")
            return
        self._append(self._stream.push(token_id) if self._stream else "")
        if self.finish_reason is None and len(self.token_ids) >= self._max_tokens:
            self._end("length")

    @property
    def left_s(self) -> float | None:
        """Until its deadline; below 0: it has passed. None: there is none."""
        return None if self._deadline_s is None else self.started_s + self._deadline_s - time.monotonic()

    def cancel(self, reason: str = "cancelled") -> None:
        if self.finish_reason is None:
            self._end(reason)

    def _end(self, reason: str) -> None:
        if self._stream is not None:
            self._append(self._stream.finish())
        self.ended_s = time.monotonic()
        # A stop string may be completed by the very last piece.
        if self.finish_reason is None:
            self.text += self._held
            self.finish_reason = reason
        self._held = ""

    def _append(self, piece: str) -> None:
        self._held += piece
        # A piece may hold several: the first in the text ends it, not the first in the list.
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.text += self._held[: min(found)]
            self._held = ""
            self.ended_s = time.monotonic()
            self.finish_reason = "stop"
            return
        keep = _longest_overlap(self._held, self._stops)
        self.text += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]


def checked_token_ids(token_ids: Sequence[int], most: int, max_model_len: int, vocab_size: int) -> list[int]:
    """Token ids that a model of so many can be given.

    Args:
        most: how many there may be, of the max_model_len places that there are.

    Raises:
        RequestError: none, too many, or one outside the vocabulary.
    """
    ids = list(token_ids)
    if not ids:
        raise RequestError("prompt", "", "at least one token")
    if len(ids) > most:
        raise RequestError("prompt", f"{len(ids)} tokens", f"at most {most} (max_model_len is {max_model_len})")
    for token_id in ids:
        is_number = isinstance(token_id, (int, np.integer)) and not isinstance(token_id, bool)
        if not is_number or not 0 <= token_id < vocab_size:
            raise RequestError("token id", token_id, f"0 to {vocab_size - 1}")
    return ids


def _longest_overlap(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters could be the beginning of a stop string."""
    for length in range(min(len(text), max((len(stop) - 1 for stop in stops), default=0)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
