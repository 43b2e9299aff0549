"""One request and its completion so far: tokens, text, and why it ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from tsqp_shm.errors import RequestError, TsqpError
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.scalars import whole
from tsqp_shm.tee.answer import Answer
from tsqp_shm.tee.caches import Cache, Keeper
from tsqp_shm.tee.receipts import Receipt
from tsqp_shm.tee.sampler import TokenScore, drawn_seed, token_sampler
from tsqp_shm.tee.sampling_params import SamplingParams


class Completion:
    """Grows token by token.

    Args:
        max_tokens: most tokens that it may have, whatever the params say.
        seed: of its request, where that has several completions; None: the params', or one that is drawn.
        receipt: of its request, where evidence is written.
        request_id: of its request.

    Attributes:
        prompt_token_ids: what was asked.
        index: which completion of its request.
        seed: by which its tokens are drawn; None where none is drawn.
        receipt: by which its requester finds and opens the record of the request; None where no evidence is written.
        sampler: draws its tokens, and knows those that it has.
        token_ids: what was answered so far, an ending token included.
        scores: of each of these, where the params ask for log probabilities.
        prompt_scores: of each token of the prompt but the first, where the params ask for them.
        text: the answer so far, without special tokens; what the decoding of prompt and answer has after that of the
            prompt. Never half a character, never a part of a stop string.
        stop_reason: the stop string or stop token that has ended it, if one has.
        finish_reason: None, "stop" (end-of-sequence token, stop token or stop string), "length", "deadline",
            "cancelled" or "error"; set when everything else is, as other threads look at it.
        error: why no token can follow, where that has ended it.
        keeper: for whose next request its cache is kept; None: for nobody's. To be set before it is run.
        cached: how many tokens of prompt and answer lie in the cache.
        num_cached_tokens: how many tokens of the prompt lay there before it was run.
        cached_from: the request that has put them there, by its number in the session's evidence; None where none has,
            or none is written.
        arrival_s: when it was handed in, on the system's clock.
        started_s, begun_s, queued_s, scheduled_s, first_token_s, last_token_s, ended_s: on the monotonic clock, when it
            was made, handed in, taken by who runs the steps, given a place in the batch, had its first token and its
            newest, and ended; None until then.

    Raises:
        RequestError: the params do not fit the model.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        eos_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        index: int = 0,
        seed: int | None = None,
        receipt: Receipt | None = None,
        request_id: str = "",
    ) -> None:
        self.prompt_token_ids = list(prompt_token_ids)
        self.params = params
        self.vocab_size = vocab_size
        self.index = index
        self.receipt = receipt
        self.request_id = request_id
        self.seed = drawn_seed(params) if seed is None else seed
        self.sampler = token_sampler(
            params,
            self.prompt_token_ids,
            vocab_size,
            seed=self.seed,
            index=index,
            ending_token_ids=(*eos_token_ids, *params.stop_tokens),
            tokenizer=tokenizer,
        )
        self.token_ids: list[int] = []
        self.scores: list[TokenScore] = []
        self.prompt_scores: list[TokenScore] = []
        self.text = ""
        self.stop_reason: str | int | None = None
        self.finish_reason: str | None = None
        self.error: TsqpError | None = None
        self.keeper: Keeper | None = None
        self.cached = self.num_cached_tokens = 0
        self.cached_from: int | None = None
        self.arrival_s = time.time()
        self.started_s = self.begun_s = time.monotonic()
        self.queued_s: float | None = None
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.ended_s: float | None = None
        self.max_tokens = max_tokens
        self._has_begun = False
        self._eos_token_ids = () if params.ignore_eos else tuple(eos_token_ids)
        # Of several completions of a prompt, one scores it.
        scores_prompt = params.prompt_logprobs is not None and index == 0
        self._num_to_score = len(self.prompt_token_ids) - 1 if scores_prompt else 0
        self._answer = None
        if tokenizer is not None and params.detokenize:
            self._answer = Answer(tokenizer, self.prompt_token_ids, params)

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.token_ids

    @property
    def _num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def num_uncached(self) -> int:
        return self._num_tokens - self.cached

    @property
    def decodes(self) -> bool:
        """Whether nothing is to be computed but the token that was drawn last."""
        return bool(self.token_ids) and self.num_uncached == 1

    def find_cached(self, cache: Cache) -> None:
        """Goes on from what a cache holds of its prompt. The last token is run in any case, for its logits, and where
        the prompt is scored all are."""
        most = 0 if self._num_to_score else min(len(cache.token_ids), len(self.prompt_token_ids) - 1)
        pairs = zip(cache.token_ids[:most], self.prompt_token_ids, strict=False)
        self.cached = next((place for place, (held, asked) in enumerate(pairs) if held != asked), most)
        self.num_cached_tokens = self.cached
        self.cached_from = cache.request if self.cached else None

    def lose_cached(self) -> None:
        """Nothing of it lies in a cache any more."""
        self.cached = 0
        if not self.token_ids:
            self.num_cached_tokens, self.cached_from = 0, None

    def uncached_token_ids(self, most: int) -> list[int]:
        """The tokens whose positions are not in the cache yet, at most so many."""
        return self.all_token_ids[self.cached : self.cached + most]

    def num_wanted(self, end: int) -> int:
        """After how many of the positions from `cached` to `end`, the last ones, logits are wanted."""
        num_scored = len(self.prompt_scores)
        first = num_scored if num_scored < self._num_to_score else self._num_tokens - 1
        return max(0, end - max(self.cached, first))

    def scored_token(self, position: int) -> int | None:
        """What the logits after a position score; None: the next token is drawn from them."""
        return self.prompt_token_ids[position + 1] if position < self._num_tokens - 1 else None

    def begin(self) -> None:
        """Says that it is run now, which it is once.

        Raises:
            RequestError: it was before.
        """
        if self._has_begun:
            raise RequestError("completion", "one that was run before", "a new one")
        self._has_begun = True
        self.arrival_s, self.begun_s = time.time(), time.monotonic()

    def score_prompt(self, scores: Sequence[TokenScore]) -> None:
        """Takes the scores of the prompt's next tokens."""
        self.prompt_scores += scores

    def grow(self, token_id: int, score: TokenScore | None = None) -> None:
        """Takes the next token."""
        self.last_token_s = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        self.sampler.grow(token_id)
        self.token_ids.append(token_id)
        if score is not None:
            self.scores.append(score)
        is_eos = token_id in self._eos_token_ids
        is_last = is_eos or token_id in self.params.stop_tokens
        if self._answer is not None:
            self.text += self._answer.push(
                token_id,
                is_shown=not is_last or self.params.include_stop_str_in_output,
                may_stop=len(self.token_ids) > self.params.min_tokens,
            )
        if is_last:
            self._end("stop", None if is_eos else token_id)
        elif self._answer is not None and self._answer.stopped_by is not None:
            self._end("stop")
        elif len(self.token_ids) >= self.max_tokens:
            self._end("length")

    def fail(self, error: TsqpError) -> None:
        """Ends because it cannot go on; no other completion is concerned."""
        self.error = error
        self._end("error")

    def refuse_rules(self) -> None:
        """Ends because its rules leave no token."""
        given = f"rules that leave none as token {len(self.token_ids)} of the completion"
        expected = "one at least that allowed_token_ids has and bad_words and min_tokens do not forbid"
        self.fail(RequestError("sampling_params", given, expected))

    @property
    def left_s(self) -> float | None:
        """Until its deadline; below 0: it has passed. None: there is none."""
        deadline_s = self.params.deadline_s
        return None if deadline_s is None else self.started_s + deadline_s - time.monotonic()

    def cancel(self, reason: str = "cancelled") -> None:
        if self.finish_reason is None:
            self._end(reason)

    def _end(self, reason: str, stop_token_id: int | None = None) -> None:
        self.stop_reason = stop_token_id
        if self._answer is not None:
            # A stop string may be completed by the very last piece.
            self.text += self._answer.finish()
            if self._answer.stopped_by is not None:
                reason, self.stop_reason = "stop", self._answer.stopped_by
        self.ended_s = time.monotonic()
        self.finish_reason = reason


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
