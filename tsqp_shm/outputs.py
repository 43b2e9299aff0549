"""What a request gives: plain values, as in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tsqp_shm.tee.completion import Completion


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Attributes:
        text: without the stop string and special tokens; "" where the model has no tokenizer.
        token_ids: an ending end-of-sequence token included.
        finish_reason: "stop" (end-of-sequence token or stop string), "length" or "deadline".
    """

    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """One prompt with its completion.

    Attributes:
        outputs: always one; a list as in vLLM.
        prefill_s: from the request to the first token, waiting for a place in the batch included.
        decode_s: from the first token to the last.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prefill_s: float
    decode_s: float

    @classmethod
    def of(cls, prompt: str | Sequence[int], completion: Completion) -> RequestOutput:
        """What a completion has come to."""
        first = completion.first_token_s or completion.started_s
        return cls(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=completion.prompt_token_ids,
            outputs=[CompletionOutput(completion.text, completion.token_ids, completion.finish_reason or "")],
            prefill_s=first - completion.started_s,
            decode_s=(completion.ended_s or first) - first,
        )
