"""What each field of `SamplingParams` may be: from a caller's value to Python's own, or one error that names it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tsqp_shm.errors import ConfigError
from tsqp_shm.scalars import flag, is_several, plain, real, text, whole

# As many as vLLM allows.
MOST_COMPLETIONS = 16_384
MOST_SEED = 2**64 - 1


@dataclass(frozen=True)
class _Scalar:
    """What a field of one value may be.

    Attributes:
        read: gives its value as Python's own, or None where its type is wrong.
        allows: whether such a value is in range.
        instead: values that mean another one.
    """

    expected: str
    read: Callable[[object], Any]
    allows: Callable[[Any], bool]
    instead: tuple[tuple[int | None, int | None], ...] = ()

    def __call__(self, field: str, value: object) -> Any:
        read = self.read(value)
        for meant, other in self.instead:
            if read == meant and (value is None) == (meant is None):
                return other
        if read is None:
            raise ConfigError(field, value, self.expected, is_mistyped=True)
        if not self.allows(read):
            raise ConfigError(field, read, self.expected)
        return read


@dataclass(frozen=True)
class _Several:
    """What a field of several values may be, each once; None is none of them.

    Attributes:
        read: as of `_Scalar`, of each.
        allows: as of `_Scalar`, of each.
        may_be_one: whether a string alone is one of them.
    """

    expected: str
    read: Callable[[object], Any]
    allows: Callable[[Any], bool]
    may_be_one: bool = False

    def __call__(self, field: str, values: object) -> tuple[Any, ...]:
        values = plain(values)
        if values is None:
            return ()
        is_one = self.may_be_one and isinstance(values, str)
        if not is_one and not is_several(values):
            raise ConfigError(field, values, self.expected, is_mistyped=True)
        kept: dict[Any, None] = {}
        for index, each in enumerate([values] if is_one else values):  # type: ignore[arg-type, var-annotated]
            read = self.read(each)
            if read is None or not self.allows(read):
                name = field if is_one else f"{field}[{index}]"
                raise ConfigError(name, each, self.expected, is_mistyped=read is None)
            kept[read] = None
        return tuple(kept)


def _num_logprobs(value: object) -> int | None:
    # vLLM's own reading of True.
    return 1 if flag(value) is True else whole(value)


def _allowed(field: str, values: object) -> tuple[int, ...] | None:
    if values is None:
        return None
    tokens = _Several("token ids, one at least, or None (all)", whole, _is_token)(field, values)
    if not tokens:
        raise ConfigError(field, values, "token ids, one at least, or None (all)")
    return tokens


def _biases(field: str, values: object) -> tuple[tuple[int, float], ...]:
    expected = "a dict of token ids to finite numbers"
    if values is None:
        return ()
    if not isinstance(values, Mapping) and not is_several(values):
        raise ConfigError(field, values, expected, is_mistyped=True)
    pairs = values.items() if isinstance(values, Mapping) else values
    kept = {}
    for pair in pairs:
        try:
            key, value = pair
        except (TypeError, ValueError):
            raise ConfigError(field, pair, expected, is_mistyped=True) from None
        # JSON has no other keys than strings.
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else whole(key)
        if token is None or not _is_token(token):
            raise ConfigError(f"{field}: token", key, expected, is_mistyped=token is None)
        bias = real(value)
        if bias is None or not math.isfinite(bias):
            raise ConfigError(f"{field}[{token}]", value, expected, is_mistyped=bias is None)
        kept[token] = bias
    return tuple(kept.items())


def _is_token(token: int) -> bool:
    # Below the vocabulary's size, which the model says.
    return 0 <= token < 2**31


_LOGPROBS = "a whole number, 0 or more, -1 (all), or None"
RULES: dict[str, Callable[[str, object], Any]] = {
    "n": _Scalar(f"a whole number, 1 to {MOST_COMPLETIONS:,}", whole, lambda n: 1 <= n <= MOST_COMPLETIONS),
    "presence_penalty": _Scalar("a number, -2 to 2", real, lambda x: -2 <= x <= 2),
    "frequency_penalty": _Scalar("a number, -2 to 2", real, lambda x: -2 <= x <= 2),
    "repetition_penalty": _Scalar("a number, more than 0", real, lambda x: 0 < x < math.inf),
    "temperature": _Scalar("a number, 0 or more", real, lambda x: 0 <= x < math.inf),
    "top_p": _Scalar("a number, more than 0, at most 1", real, lambda x: 0 < x <= 1),
    "top_k": _Scalar("a whole number, 0 or -1 (all) or more", whole, lambda n: n >= 0, ((-1, 0),)),
    "min_p": _Scalar("a number, 0 to 1", real, lambda x: 0 <= x <= 1),
    "seed": _Scalar(
        "a whole number, 0 to 2^64 - 1, or None", whole, lambda n: 0 <= n <= MOST_SEED, ((None, None), (-1, None))
    ),
    "stop": _Several("a string, strings or None, none of them empty", text, bool, may_be_one=True),
    "stop_token_ids": _Several("token ids or None", whole, _is_token),
    "ignore_eos": _Scalar("True or False", flag, lambda _: True),
    "max_tokens": _Scalar(
        "a whole number, 1 or more, or None (until the context is full)", whole, lambda n: n >= 1, ((None, None),)
    ),
    "min_tokens": _Scalar("a whole number, 0 or more", whole, lambda n: n >= 0),
    "logprobs": _Scalar(_LOGPROBS, _num_logprobs, lambda n: n >= -1, ((None, None),)),
    "prompt_logprobs": _Scalar(_LOGPROBS, _num_logprobs, lambda n: n >= -1, ((None, None),)),
    "detokenize": _Scalar("True or False", flag, lambda _: True),
    "skip_special_tokens": _Scalar("True or False", flag, lambda _: True),
    "include_stop_str_in_output": _Scalar("True or False", flag, lambda _: True),
    "bad_words": _Several("strings or None, none of them empty", text, bool),
    "logit_bias": _biases,
    "allowed_token_ids": _allowed,
    "deadline_s": _Scalar("seconds, more than 0, or None", real, lambda x: 0 < x < math.inf, ((None, None),)),
}
