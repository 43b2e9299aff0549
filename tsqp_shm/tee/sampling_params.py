"""How a completion is sampled, as a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tsqp_shm.arguments import refuse_unknown
from tsqp_shm.errors import ConfigError
from tsqp_shm.scalars import flag, plain, real, text, whole

# What transformers, OpenAI and llama.cpp call it.
NAMES_HERE = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "do_sample": "temperature (0: the likeliest token)",
    "repeat_penalty": "repetition_penalty",
    "max_time": "deadline_s",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a completion is sampled; names and meanings as in vLLM, of which some are missing. A value: it can be
    compared, hashed, copied and pickled.

    Attributes:
        max_tokens: most tokens to generate; None: until the context is full.
        temperature: 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens; 0 or -1: all.
        top_p: sample among the likeliest tokens that together have this probability.
        repetition_penalty: above 1 makes tokens of prompt and completion less likely (Keskar et al. 2019).
        seed: makes the completion repeatable in the same company; None or -1 draws a new one. Beside other prompts the
            products have other shapes and round differently, which can tip a draw between near equals.
        stop: a string or strings that end the completion; they are not part of it. They are looked for in the text
            that has special tokens spelled out.
        ignore_eos: go on after an end-of-sequence token.
        deadline_s: ends the completion so many seconds after its prompt has been encoded, with what it has by then, in
            the middle of a step too. None: it may take as long as it takes.

    Raises:
        ConfigError: a value of another type or outside its range, or an argument that there is not.
    """

    max_tokens: int | None = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Iterable[str] | None = ()
    ignore_eos: bool = False
    deadline_s: float | None = None

    # Before the dataclass's own `__init__`, whose answer to a wrong name is a TypeError.
    def __new__(cls, *positional: object, **given: object) -> SamplingParams:
        if positional:
            # In vLLM the first are others.
            raise ConfigError("SamplingParams", positional[0], "arguments by name", is_mistyped=True)
        refuse_unknown(given, cls.__dataclass_fields__, NAMES_HERE)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field, rule in _RULES.items():
            object.__setattr__(self, field, rule.checked(field, getattr(self, field)))
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it is kept, whatever it was given as."""
        assert isinstance(self.stop, tuple)
        return self.stop


class _Rule(NamedTuple):
    """What a field may be.

    Attributes:
        read: gives its value as Python's own, or None where its type is wrong.
        allows: whether such a value is in range.
        instead: values that mean another one.
    """

    expected: str
    read: Callable[[object], Any]
    allows: Callable[[Any], bool]
    instead: tuple[tuple[int | None, int | None], ...] = ()

    def checked(self, field: str, value: object) -> Any:
        read = self.read(value)
        for meant, other in self.instead:
            if read == meant and (value is None) == (meant is None):
                return other
        if read is None:
            raise ConfigError(field, value, self.expected, is_mistyped=True)
        if not self.allows(read):
            raise ConfigError(field, read, self.expected)
        return read


_RULES = {
    "max_tokens": _Rule(
        "a whole number, 1 or more, or None (until the context is full)", whole, lambda n: n >= 1, ((None, None),)
    ),
    "temperature": _Rule("a number, 0 or more", real, lambda x: 0 <= x < math.inf),
    "top_k": _Rule("a whole number, 0 or -1 (all) or more", whole, lambda n: n >= 0, ((-1, 0),)),
    "top_p": _Rule("a number, more than 0, at most 1", real, lambda x: 0 < x <= 1),
    "repetition_penalty": _Rule("a number, more than 0", real, lambda x: 0 < x < math.inf),
    "seed": _Rule("a whole number, 0 or more, or None", whole, lambda n: n >= 0, ((None, None), (-1, None))),
    "ignore_eos": _Rule("True or False", flag, lambda _: True),
    "deadline_s": _Rule("seconds, more than 0, or None", real, lambda x: 0 < x < math.inf, ((None, None),)),
}


def _stop_strings(stop: object) -> tuple[str, ...]:
    expected = "a string, strings or None, none of them empty"
    stop = plain(stop)
    if stop is None:
        return ()
    # Bytes are a sequence too, of numbers, and of a mapping nobody can tell what is meant.
    if isinstance(stop, (bytes, bytearray, Mapping)) or not isinstance(stop, Iterable):
        raise ConfigError("stop", stop, expected, is_mistyped=True)
    strings = []
    for index, each in enumerate((stop,) if isinstance(stop, str) else stop):
        string = text(each)
        if not string:
            raise ConfigError(
                "stop" if isinstance(stop, str) else f"stop[{index}]", each, expected, is_mistyped=string is None
            )
        strings.append(string)
    return tuple(strings)
