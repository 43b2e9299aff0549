"""What a client is told when it gets no answer: OpenAI's error object, and the status that goes with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from tsqp_shm.errors import (
    ConfigError,
    IntegrityError,
    LimitError,
    NumericsError,
    PadsExhausted,
    RequestError,
    TsqpError,
)
from tsqp_shm.model.confined import ConfinedError

_COUNT = re.compile(r"(more than )?[0-9,]+ (tokens|characters)")
_SHOWN = (bool, int, float, type(None))


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        kind, param, code: as in OpenAI's error object.
        headers: beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)

    @classmethod
    def of(cls, error: TsqpError, names: Mapping[str, str] | None = None) -> Refusal:
        """What an error of the session or of a request is to who has asked.

        No text of a request is repeated, as an answer may be logged on its way.

        Args:
            names: what the request calls fields of `SamplingParams`.
        """
        if isinstance(error, IntegrityError):
            return cls(503, str(error), kind="server_error", code="integrity_error")
        if isinstance(error, PadsExhausted):
            return cls(429, str(error), kind="server_error", code="pads_exhausted", headers={"Retry-After": "5"})
        if isinstance(error, NumericsError):
            return cls(422, str(error), code="numerics_error")
        if isinstance(error, RequestError) and isinstance(error.__cause__, ConfinedError):
            # What the model's own programs say of a text may be that text.
            return cls(400, "the model's tokenizer or chat template refuses this", param=_param(error.field, names))
        if isinstance(error, ConfigError):
            message = f"{_param(error.field, names)}: expected {error.expected}, got {_given(error.value)}"
            is_long = isinstance(error, RequestError) and error.expected.startswith("at most") and "token" in message
            code = "context_length_exceeded" if is_long else None
            return cls(400, message, param=_param(error.field, names), code=code)
        if isinstance(error, LimitError):
            return cls(503, str(error), kind="server_error", code="overloaded", headers={"Retry-After": "5"})
        return cls(503, "the session is over", kind="server_error", code=type(error).__name__)


def wrong(param: str, value: object, expected: str) -> Refusal:
    """A field of a request that is not what it should be."""
    return Refusal(400, f"{param}: expected {expected}, got {_given(value)}", param=param)


def _given(value: object) -> str:
    if isinstance(value, str) and _COUNT.fullmatch(value):
        # A count that this package has made.
        return value
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    if isinstance(value, _SHOWN):
        return repr(value)
    kind = {"list": "an array", "dict": "an object", "tuple": "an array"}.get(type(value).__name__, "another type")
    return f"{kind} of {len(value)}" if isinstance(value, (list, dict, tuple)) else kind


def _param(field: str, names: Mapping[str, str] | None) -> str:
    name, bracket, rest = field.partition("[")
    return (names or {}).get(name, name) + bracket + rest
