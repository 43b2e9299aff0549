"""How a completion is sampled, as a value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from tsqp_shm.arguments import refuse_unknown
from tsqp_shm.errors import ConfigError
from tsqp_shm.tee.sampling_values import RULES

# What transformers, OpenAI and llama.cpp call it.
NAMES_HERE = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "top_logprobs": "logprobs",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "do_sample": "temperature (0: the likeliest token)",
    "repeat_penalty": "repetition_penalty",
    "sequence_bias": "logit_bias",
    "max_time": "deadline_s",
}

# vLLM's that there are not, and why.
NOT_HERE = {
    "best_of": "vLLM has it no more; ask for `n` and choose by `cumulative_logprob`",
    "use_beam_search": "there is no beam search",
    "structured_outputs": "no grammar is followed; `allowed_token_ids` allows tokens",
    "guided_decoding": "no grammar is followed; `allowed_token_ids` allows tokens",
    "logits_processors": "no caller's code runs inside a step",
    "spaces_between_special_tokens": "the text is what the tokenizer's own decoder makes of the tokens",
    "truncate_prompt_tokens": "a prompt is never cut; cut it before",
    "output_kind": "`generate` gives what is complete, `stream` each piece",
    "stream_interval": "`stream` gives each piece when it is there",
    "flat_logprobs": "log probabilities are a dict for each token",
    "logprob_token_ids": "`logprobs` gives the likeliest; -1 gives all",
    "prompt_logprob_token_ids": "`prompt_logprobs` gives the likeliest; -1 gives all",
    "prompt_logprob_start": "`prompt_logprobs` gives all of the prompt",
    "watermarking": "nothing is marked",
    "thinking_token_budget": "no token is known to begin or end thinking",
    "repetition_detection": "`frequency_penalty` and `repetition_penalty` are what there is against repetition",
    "routed_experts_prompt_start": "no model with experts is supported",
    "trace_decode_token_ids": "`prompt_logprobs` scores given tokens",
    "skip_reading_prefix_cache": "there is no prefix cache",
    "skip_clone": "a SamplingParams never changes",
    "extra_args": "there is nobody who would read them",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a completion is sampled; names, meanings and defaults are vLLM's, `deadline_s` is ours. A value: it can be
    compared, hashed, copied and pickled.

    Filters go in this order: allowed tokens, bad words, min_tokens, bias, penalties, temperature, min_p, top_k, top_p.

    Attributes:
        n: completions of each prompt; each reads the prompt again.
        presence_penalty: is taken off the logits of tokens that the completion has.
        frequency_penalty: is taken off the logits of tokens as often as the completion has them.
        repetition_penalty: above 1 makes tokens of prompt and completion less likely (Keskar et al. 2019).
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together have this probability.
        top_k: sample among this many likeliest tokens; 0 or -1: all.
        min_p: sample among the tokens that have this share of the likeliest one's probability.
        seed: makes a completion repeatable: it and the completion's index are the key of a random generator whose
            counter is the token's position, so given the same logits the tokens are the same whatever else runs, and
            after a restart. Beside other prompts the products may have other shapes and round differently, which can
            tip a draw between near equals. None or -1 draws one, which the output tells.
        stop: a string or strings that end the completion; they are not part of it. They are looked for in the text
            that has special tokens spelled out.
        stop_token_ids: tokens that end the completion, in its token ids and not in its text.
        ignore_eos: go on after an end-of-sequence token.
        max_tokens: most tokens to generate; None: until the context is full.
        min_tokens: before there are so many, nothing but `max_tokens` ends the completion.
        logprobs: give the log probability of each token, and of so many of the likeliest, by the logits as they come
            from the model; -1: of all.
        prompt_logprobs: the same of the prompt's tokens.
        detokenize: False leaves the text empty.
        skip_special_tokens: False leaves special tokens in the text.
        include_stop_str_in_output: the text ends with what has stopped it.
        bad_words: texts whose last token is not drawn after their others.
        logit_bias: is added to the logits of tokens, by their ids; kept as pairs.
        allowed_token_ids: nothing else is drawn.
        deadline_s: ends the completion so many seconds after its prompt has been encoded, with what it has by then, in
            the middle of a step too. None: it may take as long as it takes.

    Raises:
        ConfigError: a value of another type or outside its range, or an argument that there is not.

    Example:
        >>> SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=64).temperature
        0.8
        >>> SamplingParams(temprature=0.8)
        Traceback (most recent call last):
        tsqp_shm.errors.ConfigError: temprature: got 0.8, expected none of this name; near it: temperature
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    bad_words: Iterable[str] | None = ()
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] | None = ()
    allowed_token_ids: Iterable[int] | None = None
    deadline_s: float | None = None

    # Before the dataclass's own `__init__`, whose answer to a wrong name is a TypeError.
    def __new__(cls, *positional: object, **given: object) -> SamplingParams:
        if positional:
            # Programs for vLLM write names, too.
            raise ConfigError("SamplingParams", positional[0], "arguments by name", is_mistyped=True)
        for name in given:
            if name in NOT_HERE:
                raise ConfigError(name, given[name], f"none of this name: {NOT_HERE[name]}")
        refuse_unknown(given, cls.__dataclass_fields__, NAMES_HERE)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field, rule in RULES.items():
            object.__setattr__(self, field, rule(field, getattr(self, field)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise ConfigError("n", self.n, "1 where temperature is 0, as all of them would be one")
        if self.stop and not self.detokenize:
            raise ConfigError("stop", self.stop, "no stop strings where detokenize is False")

    # As they are kept, whatever they were given as.

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.stop)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return cast(tuple[int, ...], self.stop_token_ids)

    @property
    def forbidden_words(self) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.bad_words)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def allowed_tokens(self) -> tuple[int, ...] | None:
        return cast("tuple[int, ...] | None", self.allowed_token_ids)


# Of who asks for nothing, where the model says nothing: the front's own.
UNASKED = SamplingParams(temperature=0.0, max_tokens=64)
