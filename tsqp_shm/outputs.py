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

    Example:
        >>> params = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
        >>> (first,) = llm.generate("The capital of France is", params)[0].outputs[0].logprobs
        >>> [(scored.rank, scored.decoded_token) for scored in first.values()]
        [(1, ' Paris'), (2, ' the')]
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

    Example:
        >>> params = SamplingParams(temperature=0, max_tokens=20, stop="\\n")
        >>> completion = llm.generate("The capital of France is", params)[0].outputs[0]
        >>> completion.text, completion.finish_reason, completion.stop_reason
        (' Paris.', 'stop', '\\n')
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
class RequestMetrics:
    """When what happened to a request, under vLLM's names; of several completions, to the first of them, and at last to
    the last.

    Units: seconds; on the monotonic clock, but for `arrival_time`. 0.0 where it has not happened.

    Attributes:
        num_generation_tokens: of all completions.
        arrival_time: when it was handed in, on the system's clock.
        queued_ts: when the session took it.
        scheduled_ts: when it got a place in the batch.
        first_token_ts, last_token_ts: when there was a first token, and the last.
        first_token_latency: from being handed in to the first token.

    Example:
        >>> metrics = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=5))[0].metrics
        >>> metrics.queued_ts <= metrics.scheduled_ts < metrics.first_token_ts < metrics.last_token_ts
        True
    """

    num_generation_tokens: int
    arrival_time: float
    queued_ts: float
    scheduled_ts: float
    first_token_ts: float
    last_token_ts: float
    first_token_latency: float

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> RequestMetrics:
        def times(name: str) -> list[float]:
            return [time_s for each in completions if (time_s := getattr(each, name)) is not None]

        begun_s, first_token_s = min(times("begun_s")), min(times("first_token_s"), default=None)
        return cls(
            num_generation_tokens=sum(len(each.token_ids) for each in completions),
            arrival_time=min(times("arrival_s")),
            queued_ts=min(times("queued_s"), default=0.0),
            scheduled_ts=min(times("scheduled_s"), default=0.0),
            first_token_ts=first_token_s or 0.0,
            last_token_ts=max(times("last_token_s"), default=0.0),
            first_token_latency=0.0 if first_token_s is None else first_token_s - begun_s,
        )


@dataclass(frozen=True)
class RequestOutput:
    """One prompt with its completions.

    Attributes:
        request_id: "0", "1", ...: its number among the session's requests, in the order in which they came.
        prompt: its text; None where it was given as token ids alone.
        prompt_logprobs: of each token of the prompt, where the params ask for them; None for the first, which nothing
            comes before.
        outputs: as many as the params ask for.
        metrics: when what happened to it.
        prefill_s: from the request to the first token, waiting for a place in the batch included.
        decode_s: from the first token to the last.
        num_cached_tokens: how many tokens of the prompt lay in a cache already, and were not computed again.
        receipt: the number of the request in the session's evidence, and the nonce that opens its record; None where no
            evidence is written.

    Example:
        >>> (output,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=2))
        >>> output.prompt, output.outputs[0].text, output.finished
        ('The capital of France is', ' Paris.', True)
        >>> len(output.prompt_token_ids), output.metrics.num_generation_tokens
        (5, 2)
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
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
            request_id=first.request_id,
            prompt=prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[_output(completion, decode) for completion in completions],
            metrics=RequestMetrics.of(completions),
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
