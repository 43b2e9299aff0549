"""One request and its completion so far: tokens, text, and why it ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from tsqp_shm.errors import RequestError
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.scalars import whole
from tsqp_shm.tee.answer import Answer
from tsqp_shm.tee.ops import Float32
from tsqp_shm.tee.sampler import Sampler
from tsqp_shm.tee.sampling_params import SamplingParams


class Completion:
    """Grows token by token.

    Attributes:
        prompt_token_ids: what was asked.
        token_ids: what was answered so far, an ending token included.
        text: the answer so far, without special tokens; what the decoding of prompt and answer has after that of the
            prompt. Never half a character, never a part of a stop string.
        stop_reason: the stop string that has ended it, if one has.
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
        self.stop_reason: str | None = None
        self.finish_reason: str | None = None
        self.cached = 0
        self.started_s = time.monotonic()
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self._has_begun = False
        self._sampler = Sampler(params)
        self._deadline_s = params.deadline_s
        self._max_tokens = max_tokens
        self._eos_token_ids = () if params.ignore_eos else tuple(eos_token_ids)
        self._answer = Answer(tokenizer, self.prompt_token_ids, params.stop_strings) if tokenizer else None

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
            if self._answer is not None:
                self.text += self._answer.push_hidden(token_id)
            self._end("stop")
            return
        if self._answer is not None:
            self.text += self._answer.push(token_id)
            if self._answer.stopped_by is not None:
                self._end("stop")
                return
        if len(self.token_ids) >= self._max_tokens:
            self._end("length")

    @property
    def left_s(self) -> float | None:
        """Until its deadline; below 0: it has passed. None: there is none."""
        return None if self._deadline_s is None else self.started_s + self._deadline_s - time.monotonic()

    def cancel(self, reason: str = "cancelled") -> None:
        if self.finish_reason is None:
            self._end(reason)

    def _end(self, reason: str) -> None:
        if self._answer is not None:
            # A stop string may be completed by the very last piece.
            self.text += self._answer.finish()
            self.stop_reason = self._answer.stopped_by
        self.ended_s = time.monotonic()
        self.finish_reason = reason if self.stop_reason is None else "stop"


def checked_token_ids(
    token_ids: Iterable[object], most: int, max_model_len: int, vocab_size: int, name: str = "prompt"
) -> list[int]:
    """Token ids that a model of so many can be given.

    Args:
        token_ids: numbers of any type; of an endless one no more is read than is looked at.
        most: how many there may be, of the max_model_len places that there are.
        name: what they are to the caller.

    Raises:
        RequestError: none, too many, or one outside the vocabulary.
    """
    ids: list[Any] = list(islice(token_ids, most + 1))
    if not ids:
        raise RequestError(name, "0 tokens", "at least one token")
    if len(ids) > most:
        count = f"{len(token_ids):,}" if isinstance(token_ids, (list, tuple)) else f"more than {most:,}"
        raise RequestError(name, f"{count} tokens", f"at most {most} (max_model_len is {max_model_len})")
    if not all(type(token_id) is int for token_id in ids):
        ids = [_token_id(token_id, f"{name}: token {place}", vocab_size) for place, token_id in enumerate(ids)]
    if min(ids) < 0 or max(ids) >= vocab_size:
        place = next(place for place, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
        raise RequestError(f"{name}: token {place}", ids[place], f"a token id, 0 to {vocab_size - 1}")
    return ids


def _token_id(value: object, name: str, vocab_size: int) -> int:
    token_id = whole(value)
    if token_id is None:
        raise RequestError(name, value, f"a token id, 0 to {vocab_size - 1}", is_mistyped=True)
    return token_id
