"""transformers in one process, unsplit, as a contender: `python -m tsqp_shm.bench.transformers_whole`."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import Any

from tsqp_shm.bench.cases import Job, Turn
from tsqp_shm.bench.child import Answer, measured, serve


class TransformersWhole:
    """The model's own class in transformers; `transformers-sdpa` and `transformers-eager` differ in the attention."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        torch.set_num_threads(job.threads)
        self.device = job.device
        if job.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        stack.enter_context(torch.inference_mode())
        attention = job.contender.removeprefix("transformers-")
        model: Any = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, job.dtype), attn_implementation=attention, local_files_only=True
        )
        self._model = model.to(self.device).eval()
        self.processes = {"whole": os.getpid()}

    def repeat(self, turn: Turn) -> Answer:
        prompts = turn.prompts(self._model.config.vocab_size)
        token_ids = self._torch.tensor(prompts, device=self.device)
        answer: Answer = {}
        if not turn.new_tokens:
            with measured(self.processes, answer):
                self._next(token_ids, None)
            return {**answer, "tokens": turn.tokens}
        next_ids, cache = self._next(token_ids, None)
        with measured(self.processes, answer):
            for _ in range(turn.new_tokens):
                next_ids, cache = self._next(next_ids, cache)
        return {**answer, "tokens": turn.new_tokens * turn.sequences}

    def _next(self, token_ids: Any, cache: Any) -> tuple[Any, Any]:
        """One forward pass. Shapes: token_ids [N, T]; the likeliest next ids [N, 1]."""
        output = self._model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        next_ids = output.logits[:, -1].argmax(-1, keepdim=True)
        # What a sampler does too: it waits for the device.
        next_ids.tolist()
        return next_ids, output.past_key_values


if __name__ == "__main__":
    sys.exit(serve(TransformersWhole))
