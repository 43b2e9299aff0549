"""An answer as it is made, and why it was cut where it was."""

from __future__ import annotations

import sys
from contextlib import closing

from tsqp_shm.llm import LLM
from tsqp_shm.tee.completion import Completion


def show(llm: LLM, completion: Completion, *, is_shown: bool = True) -> None:
    """Runs a completion and prints it piece by piece on standard output.

    Raises:
        TsqpError: as `LLM.stream_completion`.
    """
    try:
        with closing(llm.stream_completion(completion)) as pieces:
            for piece in pieces:
                if is_shown:
                    print(piece, end="", flush=True)
    except BaseException:
        # What is said of it next begins a line; elsewhere than on a terminal there is nothing but the text.
        if is_shown and sys.stdout.isatty():
            print(flush=True)
        raise
    if is_shown:
        print(flush=True)


def why_cut(llm: LLM, completion: Completion) -> str | None:
    """What has ended an answer before its end, and what to do; None: it has ended by itself."""
    tokens = len(completion.token_ids)
    if completion.finish_reason == "length":
        if len(completion.prompt_token_ids) + tokens < llm.max_model_len:
            return f"cut at {tokens:,} tokens; --max-new-tokens N allows more"
        more = llm.spec.max_positions
        advice = f"; --max-model-len allows up to {more:,}" if more > llm.max_model_len else ", the most of this model"
        return f"cut at {llm.max_model_len:,} tokens of prompt and answer{advice}"
    if completion.finish_reason == "deadline":
        return f"cut at its deadline of {completion.params.deadline_s:g} s; --deadline S allows more"
    if completion.finish_reason == "cancelled":
        return f"cut by Ctrl-C after {tokens:,} tokens"
    return None
