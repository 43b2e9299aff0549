"""What both kinds of answers have in common: ids, usage, reasons, log probabilities as clients read them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from tsqp_shm.llm import LLM
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.sampler import TokenScore
from tsqp_shm.tee.sampling_params import SamplingParams

# OpenAI has no words for a deadline.
_REASONS = {"deadline": "length"}


class Answered:
    """The head of each object of one answer."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._head = {"object": kind, "created": int(time.time()), "model": model}

    def body(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, **self._head, "choices": list(choices), **more}


def finish_reason(completion: Completion) -> str | None:
    reason = completion.finish_reason
    return reason if reason is None else _REASONS.get(reason, reason)


def usage(completions: Sequence[Completion], num_prompts: int = 1, *, drops_answers: bool = False) -> dict[str, Any]:
    """Args:
    num_prompts: each of whose completions are one behind the other.
    drops_answers: the tokens that were drawn are not given.
    """
    prompt = sum(len(each.prompt_token_ids) for each in completions[:: len(completions) // num_prompts])
    answer = 0 if drops_answers else sum(len(each.token_ids) for each in completions)
    cached = sum(getattr(each, "num_cached_tokens", 0) for each in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def prepared(llm: LLM, prompt: Any, params: SamplingParams, count: int) -> list[Completion]:
    """So many completions of one prompt.

    Raises:
        RequestError: as `LLM.generate`.
    """
    return [each for _ in range(count // params.n) for each in llm.prepare(prompt, params)]


class Spelling:
    """Tokens as log probabilities name them."""

    def __init__(self, llm: LLM) -> None:
        self._tokenizer = llm.tokenizer

    def text(self, token_id: int) -> str:
        return self._tokenizer.spelled(token_id)

    def chat(self, scores: Sequence[TokenScore], num_top: int) -> dict[str, Any]:
        """Of chat completions."""
        return {"content": [self._entry(score, num_top) for score in scores]}

    def _entry(self, score: TokenScore, num_top: int) -> dict[str, Any]:
        top = zip(score.top_token_ids.tolist(), score.top_logprobs.tolist(), strict=True)
        return {
            **self._named(score.token_id, score.logprob),
            "top_logprobs": [self._named(token_id, logprob) for token_id, logprob in list(top)[:num_top]],
        }

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.text(token_id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


class LegacyLogprobs:
    """The `logprobs` of completions, which grow: text offsets go on where the last piece ended."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._offset = 0

    def take(self, token_ids: Sequence[int], scores: Sequence[TokenScore | None]) -> dict[str, Any]:
        """Args:
        scores: of each of the tokens; None of the first of a prompt, which nothing comes before.
        """
        tokens = [self._spelling.text(token_id) for token_id in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if score is None else max(score.logprob, -9999.0) for score in scores],
            "top_logprobs": [None if score is None else self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: TokenScore) -> dict[str, float]:
        top = [(score.token_id, score.logprob)]
        top += zip(score.top_token_ids.tolist(), score.top_logprobs.tolist(), strict=True)
        found: dict[str, float] = {}
        for token_id, logprob in sorted(top, key=lambda each: -each[1]):
            # Two tokens may have one text alone; the likelier one is meant.
            found.setdefault(self._spelling.text(token_id), max(logprob, -9999.0))
        return found
