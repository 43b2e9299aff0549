"""From logits to tokens and their log probabilities, a slot's worth of rows in one native call each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tsqp_shm import _native
from tsqp_shm.errors import RequestError
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.tee.ops import Float32
from tsqp_shm.tee.sampling_params import SamplingParams

Int32 = npt.NDArray[np.int32]


class TokenScore(NamedTuple):
    """What the logits of one position say of a token.

    Attributes:
        logprob: its log probability, by the logits as they come from the model.
        rank: how many tokens are as likely or likelier, itself included.
        top_token_ids, top_logprobs: the likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top_token_ids: Int32
    top_logprobs: Float32


def drawn_seed(params: SamplingParams) -> int | None:
    """What a request is drawn by; None where nothing is drawn."""
    if params.seed is not None or params.temperature == 0:
        return params.seed
    return int.from_bytes(os.urandom(8), "little")


def token_sampler(
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    vocab_size: int,
    *,
    seed: int | None,
    index: int,
    ending_token_ids: Sequence[int],
    tokenizer: Tokenizer | None,
) -> _native.TokenSampler:
    """What draws the tokens of one completion.

    Args:
        index: which completion of its request; with the seed the key of its random generator.
        ending_token_ids: those that min_tokens keeps from being drawn.

    Raises:
        RequestError: prompt or params name a token outside the vocabulary, or words that there are no tokens for.
    """
    for field, token_ids in (
        ("stop_token_ids", params.stop_tokens),
        ("logit_bias", [token_id for token_id, _ in params.biases]),
        ("allowed_token_ids", params.allowed_tokens or ()),
    ):
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise RequestError(field, token_id, f"token ids, 0 to {vocab_size - 1}")
    for field, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and count > vocab_size:
            raise RequestError(field, count, f"at most {vocab_size}, the size of the vocabulary")
    try:
        return _native.TokenSampler(
            vocab_size,
            prompt_token_ids,
            temperature=params.temperature,
            top_k=min(params.top_k, vocab_size),
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=seed or 0,
            stream=index,
            allowed=sorted(params.allowed_tokens or ()),
            bias=params.biases,
            bad_words=_tokens_of_words(params.forbidden_words, vocab_size, tokenizer),
            min_tokens=min(params.min_tokens, 2**31),
            # An end-of-sequence token that the model has no logit for is never drawn.
            ending=[token_id for token_id in ending_token_ids if token_id < vocab_size],
        )
    except IndexError as error:
        # All other tokens have been looked at.
        raise RequestError("prompt", "a token outside the vocabulary", f"token ids, 0 to {vocab_size - 1}") from error


def _tokens_of_words(words: Sequence[str], vocab_size: int, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Source: vLLM's `SamplingParams.update_from_tokenizer`: each word as it begins a text, and behind a space where
    that is a token of its own."""
    if words and tokenizer is None:
        raise RequestError("bad_words", words, "none, as the model has no tokenizer")
    forbidden: list[list[int]] = []
    for word in words:
        assert tokenizer is not None
        alone, behind = (tokenizer.encode(space + word.lstrip(), add_special_tokens=False) for space in ("", " "))
        if not alone:
            raise RequestError("bad_words", word, "words that the model's tokenizer has tokens for")
        forbidden.append(alone)
        if behind and behind[0] != alone[0] and len(behind) == len(alone):
            forbidden.append(behind)
    # What holds a token without a logit is never said.
    return [tokens for tokens in forbidden if max(tokens) < vocab_size]


def draw_tokens(logits: Float32, samplers: Sequence[_native.TokenSampler]) -> list[int]:
    """The next token of each, all in one native call; `_native.NOTHING_LEFT` where its rules leave none, and
    `_native.NOT_FINITE` where a logit is a NaN or an infinity.

    Shapes: logits [R, V] f32, private memory.
    """
    # UNTRUSTED: whatever the numbers are, what is drawn is an index below V, or one of the two.
    drawn: list[int] = _native.draw_tokens(logits, samplers).tolist()
    return drawn


def score_tokens(logits: Float32, token_ids: Sequence[int], top: int) -> list[TokenScore]:
    """What each row says of its token, and its likeliest ones.

    Shapes: logits [R, V] f32, private memory.

    Args:
        top: how many of the likeliest; -1: all.

    Raises:
        ValueError: a logit is a NaN or an infinity.
    """
    top = logits.shape[1] if top < 0 else top
    logprobs, ranks, top_tokens, top_logprobs = _native.score_tokens(logits, np.array(token_ids, np.int32), top)
    return [
        TokenScore(token_ids[row], float(logprobs[row]), int(ranks[row]), top_tokens[row], top_logprobs[row])
        for row in range(len(token_ids))
    ]
