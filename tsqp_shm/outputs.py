"""What a request gives: plain values, as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp_shm.tee.completion import Completion


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Attributes:
        index: its place in `RequestOutput.outputs`.
        text: what follows the prompt, with its first space; without the stop string and special tokens; "" where the
            model has no tokenizer.
        token_ids: an ending end-of-sequence token included.
        finish_reason: "stop" (end-of-sequence token or stop string), "length" or "deadline".
        stop_reason: the stop string that ended it; None where another thing did.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | None


@dataclass(frozen=True)
class RequestOutput:
    """One prompt with its completion.

    Attributes:
        prompt: its text; None where it was given as token ids alone.
        outputs: always one; a list as in vLLM.
        prefill_s: from the request to the first token, waiting for a place in the batch included.
        decode_s: from the first token to the last.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prefill_s: float
    decode_s: float

    @property
    def finished(self) -> bool:
        """As in vLLM, where there are outputs that are not."""
        return True

    @classmethod
    def of(cls, prompt: str | None, completion: Completion) -> RequestOutput:
        """What a completion has come to."""
        first = completion.first_token_s or completion.started_s
        output = CompletionOutput(
            index=0,
            text=completion.text,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason or "",
            stop_reason=completion.stop_reason,
        )
        return cls(
            prompt=prompt,
            prompt_token_ids=completion.prompt_token_ids,
            outputs=[output],
            prefill_s=first - completion.started_s,
            decode_s=(completion.ended_s or first) - first,
        )
