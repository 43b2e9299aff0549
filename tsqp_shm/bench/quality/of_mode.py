"""A mode of this system as a column: `python -m tsqp_shm.bench.quality.of_mode JOB_FILE`."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from tsqp_shm.bench.quality.column import ColumnJob, run_column
from tsqp_shm.bench.quality.scores import Float32
from tsqp_shm.llm import LLM
from tsqp_shm.tee.sampling_params import SamplingParams


class OfMode:
    """An `LLM` with the settings of the product."""

    def __init__(self, job: ColumnJob, stack: ExitStack) -> None:
        self._job = job
        self._llm = stack.enter_context(LLM(job.model, mode=job.kind, max_model_len=job.positions, **job.settings))

    def logits(self, token_ids: list[int]) -> Float32:
        return self._llm.logits(token_ids)

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        params = SamplingParams(max_tokens=self._job.max_new_tokens, temperature=0)
        # One after the other, as a person asks: what shares a step with others is computed otherwise.
        outputs = [self._llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
        return [output.outputs[0].token_ids for output in outputs]


if __name__ == "__main__":
    sys.exit(run_column(OfMode))
