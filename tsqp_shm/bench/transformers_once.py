"""transformers from nothing to a few tokens, streamed.

`python -m tsqp_shm.bench.transformers_once MODEL PROMPT NEW_TOKENS DTYPE DEVICE ATTENTION`
"""

from __future__ import annotations

import sys
from typing import Any


def main(model: str, prompt: str, new_tokens: str, dtype: str, device: str, attention: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    whole: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True
    )
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    with torch.inference_mode():
        whole.to(device).eval().generate(
            **inputs, max_new_tokens=int(new_tokens), do_sample=False, streamer=_Streamer(tokenizer)
        )


class _Streamer:
    """Prints each token at once, where transformers' own `TextStreamer` waits for the end of a word."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_prompt = True

    def put(self, token_ids: Any) -> None:
        if not self._is_prompt:
            print(self._tokenizer.decode(token_ids), end="", flush=True)
        self._is_prompt = False

    def end(self) -> None:
        print(flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
