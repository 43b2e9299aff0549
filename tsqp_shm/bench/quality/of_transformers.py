"""transformers as a column: `python -m tsqp_shm.bench.quality.of_transformers JOB_FILE`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import numpy as np

from tsqp_shm.bench.quality.column import ColumnJob, run_column
from tsqp_shm.bench.quality.scores import Float32


class OfTransformers:
    """The model's own class, in the dtype that the job's kind names."""

    def __init__(self, job: ColumnJob, stack: ExitStack) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._job, self._torch = job, torch
        stack.enter_context(torch.inference_mode())
        model: Any = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, job.kind), attn_implementation="eager", local_files_only=True
        )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()

    def logits(self, token_ids: list[int]) -> Float32:
        ids = self._torch.tensor([token_ids], device=self._device)
        found: Float32 = self._model(ids, use_cache=False).logits[0].float().cpu().numpy()
        return found

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: list[int]) -> list[int]:
        answer: list[int] = []
        ids, cache = self._torch.tensor([prompt], device=self._device), None
        while len(answer) < self._job.max_new_tokens:
            output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = output.logits[:, -1].float().argmax(-1, keepdim=True), output.past_key_values
            answer.append(int(np.int64(ids.item())))
            if answer[-1] in self._job.eos_token_ids:
                break
        return answer


if __name__ == "__main__":
    sys.exit(run_column(OfTransformers))
