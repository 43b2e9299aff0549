"""From the fields of a request's JSON to what the session takes. Fields that are not known are passed over, as OpenAI's
clients send new ones every month; those that would change what an answer is are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tsqp_shm.errors import ConfigError
from tsqp_shm.serve.refusal import Refusal, wrong
from tsqp_shm.tee.sampling_params import SamplingParams

# What both kinds of requests may say of sampling, under the names that `SamplingParams` has too.
_SHARED = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias",
    "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids", "bad_words",
    "allowed_token_ids", "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip
MOST_COMPLETIONS = 128
# Lists, of so many entries of so many characters: each is looked at for each token, or encoded for each completion.
_BOUNDED = (
    ("stop", 16, 200), ("bad_words", 64, 200), ("stop_token_ids", 1024, 20), ("logit_bias", 1024, 20),
    ("allowed_token_ids", 1 << 16, 20),
)  # fmt: skip
# What would be another answer without it; each value but these is refused.
_NOT_HERE: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_grammar": (),
    "guided_choice": (),
    "use_beam_search": (False,),
    "best_of": (1,),
}


class Fields:
    """A request's object. A field that is null is one that is not there."""

    def __init__(self, content: object) -> None:
        """Raises:
        Refusal: it is no object, or asks for what is not done here.
        """
        if not isinstance(content, dict):
            raise wrong("body", content, "a JSON object")
        self._content: dict[str, Any] = {name: value for name, value in content.items() if value is not None}
        for name, neutral in _NOT_HERE.items():
            if name in self._content and self._content[name] not in neutral:
                raise Refusal(400, f"{name} is not done here", param=name, code="unsupported")

    def __contains__(self, name: str) -> bool:
        return name in self._content

    def get(self, name: str) -> Any:
        return self._content.get(name)

    def required(self, name: str) -> Any:
        if name not in self._content:
            raise Refusal(400, f"{name} is missing", param=name)
        return self._content[name]

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._content.get(name, default)
        if not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self._content.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, value, "a string")
        return value

    def whole(self, name: str, lowest: int, highest: int) -> int | None:
        value = self._content.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise wrong(name, value, f"a whole number from {lowest} to {highest}")
        return value

    def params(self, defaults: SamplingParams, names: Mapping[str, str], **more: Any) -> tuple[SamplingParams, int]:
        """How each prompt is sampled, and how many completions it has: the likeliest tokens are the same each time, and
        `SamplingParams` has them once.

        Args:
            names: what the request calls fields of `SamplingParams`, by these, beside those of the same name.
            more: what it says of others.
        """
        given = {name: self._content[name] for name in _SHARED if name in self._content}
        given |= {field: self._content[name] for field, name in names.items() if name in self._content}
        for name, most, longest in _BOUNDED:
            _require_bounded(name, given.get(name), most, longest)
        if given.get("top_k") == -1:
            given["top_k"] = 0
        count = self.whole("n", 1, MOST_COMPLETIONS) or 1
        try:
            params = replace(defaults, **{**given, "n": 1}, **more)
            return (params, count) if params.temperature == 0 else (replace(params, n=count), count)
        except ConfigError as error:
            raise Refusal.of(error, names) from None

    @property
    def stream_options(self) -> tuple[bool, bool]:
        """Whether a stream ends with its usage, and whether each piece has it."""
        options = self._content.get("stream_options", {})
        if not isinstance(options, dict):
            raise wrong("stream_options", options, "an object")
        chosen = Fields(options)
        return chosen.flag("include_usage"), chosen.flag("continuous_usage_stats")


def _require_bounded(name: str, value: object, most: int, longest: int) -> None:
    """Raises:
    Refusal: there are more entries, or one is longer.
    """
    listed = [value] if isinstance(value, str) else value if isinstance(value, (list, dict)) else []
    if len(listed) > most:
        raise wrong(name, value, f"at most {most} entries")
    if any(isinstance(each, str) and len(each) > longest for each in listed):
        raise wrong(name, value, f"entries of at most {longest} characters")
