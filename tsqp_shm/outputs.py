"""What a request gives: plain values, as in vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.receipts import Receipt
from tsqp_shm.tee.sampler import TokenScore


@dataclass(frozen=True)
class Logprob:
    """What the logits of one position say of a token.

    Attributes:
        logprob: its log probability, by the logits as they come from the model: before bias, penalties, temperature.
        rank: how many tokens are as likely or likelier, itself included.
        decoded_token: its text alone; None where the model has no tokenizer or the params ask for none.
    """

    logprob: float
    rank: int
    decoded_token: str | None


# By token id: the token that is there first, then the likeliest, likeliest first.
Logprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Attributes:
        index: its place in `RequestOutput.outputs`.
        text: what follows the prompt, with its first space; without stop string, ending token and special tokens,
            unless the params ask for them; "" where the model has no tokenizer or the params ask for none.
        token_ids: an ending token included.
        cumulative_logprob: the sum of its tokens' log probabilities; None where `logprobs` is.
        logprobs: of each token, where the params ask for them.
        finish_reason: "stop" (end-of-sequence token, stop token or stop string), "length" or "deadline".
        stop_reason: the stop string or stop token that ended it; None where another thing did.
        seed: what its tokens were drawn by, together with `index`; None where none was drawn, at temperature 0.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[Logprobs] | None
    finish_reason: str
    stop_reason: str | int | None
    seed: int | None


@dataclass(frozen=True)
class RequestOutput:
    """One prompt with its completions.

    Attributes:
        prompt: its text; None where it was given as token ids alone.
        prompt_logprobs: of each token of the prompt, where the params ask for them; None for the first, which nothing
            comes before.
        outputs: as many as the params ask for.
        prefill_s: from the request to the first token, waiting for a place in the batch included.
        decode_s: from the first token to the last.
        num_cached_tokens: how many tokens of the prompt lay in a cache already, and were not computed again.
        receipt: the number of the request in the session's evidence, and the nonce that opens its record; None where no
            evidence is written.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    outputs: list[CompletionOutput]
    prefill_s: float
    decode_s: float
    num_cached_tokens: int = 0
    receipt: Receipt | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        """As in vLLM, where there are outputs that are not."""
        return True

    @property
    def seed(self) -> int | None:
        """That of all outputs, each of which has its index beside it."""
        return self.outputs[0].seed

    @classmethod
    def of(
        cls, prompt: str | None, completions: Sequence[Completion], decode: Callable[[int], str] | None
    ) -> RequestOutput:
        """What the completions of one prompt have come to.

        Args:
            decode: one token's text; None: there is no tokenizer.
        """
        first = completions[0]
        if not first.params.detokenize:
            decode = None
        started_s = first.started_s
        first_tokens_s = [each.first_token_s for each in completions if each.first_token_s is not None]
        first_token_s = min(first_tokens_s, default=started_s)
        ended_s = max(completion.ended_s or first_token_s for completion in completions)
        prompt_logprobs: list[Logprobs | None] | None = None
        if first.params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(_logprobs(score, decode) for score in first.prompt_scores)]
        return cls(
            prompt=prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[_output(completion, decode) for completion in completions],
            prefill_s=first_token_s - started_s,
            decode_s=ended_s - first_token_s,
            num_cached_tokens=first.num_cached_tokens,
            receipt=first.receipt,
        )


def _output(completion: Completion, decode: Callable[[int], str] | None) -> CompletionOutput:
    has_scores = completion.params.logprobs is not None
    return CompletionOutput(
        index=completion.index,
        text=completion.text,
        token_ids=completion.token_ids,
        cumulative_logprob=sum(score.logprob for score in completion.scores) if has_scores else None,
        logprobs=[_logprobs(score, decode) for score in completion.scores] if has_scores else None,
        finish_reason=completion.finish_reason or "",
        stop_reason=completion.stop_reason,
        seed=completion.seed,
    )


def _logprobs(score: TokenScore, decode: Callable[[int], str] | None) -> Logprobs:
    def entry(token_id: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, None if decode is None else decode(token_id))

    found = {score.token_id: entry(score.token_id, score.logprob, score.rank)}
    top = zip(score.top_token_ids.tolist(), score.top_logprobs.tolist(), strict=True)
    for rank, (token_id, logprob) in enumerate(top, 1):
        found.setdefault(token_id, entry(token_id, logprob, rank))
    return found
