"""This system as a contender: `python -m tsqp_shm.bench.ours`."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

from tsqp_shm.bench.cases import MODE_OF, Job, Turn
from tsqp_shm.bench.child import Answer, measured, serve
from tsqp_shm.llm import LLM
from tsqp_shm.modes import MODES
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.sampling_params import SamplingParams
from tsqp_shm.tee.updates import Update


class Ours:
    """An `LLM` with the settings of the product, but those that the job fixes."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        self._job = job
        mode = MODES[MODE_OF[job.contender]]
        settings: dict[str, Any] = {"tee_threads": job.threads}
        if mode.has_gpu_process:
            # As the defaults are: the TEE process has half as many, and all share the same cores.
            settings = {"tee_threads": max(1, job.threads // 2), "gpu_threads": job.threads}
            settings.update(device=job.device, timeout_s=job.timeout_s)
        if mode.arithmetic is None:
            settings["dtype"] = job.dtype
        settings.update(job.settings)
        self._llm = stack.enter_context(
            LLM(
                job.model,
                mode=mode.name,
                max_model_len=job.max_positions,
                max_num_seqs=job.max_sequences,
                **settings,
            )
        )
        facts = self._llm.bring_up()
        self._crosses = mode.has_gpu_process
        self.processes = {"tee": os.getpid()}
        if mode.has_gpu_process:
            self.processes["gpu"] = int(facts["processes"]["gpu"]["pid"])
        self.device = str(facts.get("device", "cpu"))

    def repeat(self, turn: Turn) -> Answer:
        job, llm = self._job, self._llm
        prompts = turn.prompts(llm.spec.vocab_size)
        answer: Answer = {}
        if not job.new_tokens:
            before = self._tallies()
            with measured(self.processes, answer):
                llm.generate([prompts[0]], SamplingParams(max_tokens=1, ignore_eos=True, temperature=0), use_tqdm=False)
            return {**answer, "tokens": turn.tokens, **self._since(before)}

        # The prefill is not to be counted in any number: all have their first token when the measured time begins.
        params = SamplingParams(max_tokens=job.new_tokens + 1, ignore_eos=True, temperature=0)
        completions = [llm.start(prompt, params) for prompt in prompts]
        updates: SimpleQueue[Update] = SimpleQueue()
        llm.runtime.add(completions, updates.put)
        begun: set[Completion] = set()
        ended: set[Completion] = set()
        made = 0
        while len(begun) < len(completions):
            begun.add(llm.runtime.next_update(updates).completion)
        before = self._tallies()
        with measured(self.processes, answer):
            while len(ended) < len(completions):
                update = llm.runtime.next_update(updates)
                made += len(update.token_ids)
                if update.is_last:
                    ended.add(update.completion)
        return {**answer, "tokens": made, **self._since(before)}

    def _tallies(self) -> dict[str, Any]:
        statistics = self._llm.statistics
        crossed = {
            "doorbells": statistics.doorbells,
            "bytes_to_gpu": statistics.bytes_to_gpu,
            "bytes_to_tee": statistics.bytes_to_tee,
        }
        return {
            **(crossed if self._crosses else {}),
            "operations": {
                (row["side"], row["operation"]): (row["calls"], row["total_s"]) for row in statistics.operations()
            },
        }

    def _since(self, before: dict[str, Any]) -> Answer:
        after = self._tallies()
        operations = []
        for (side, name), (calls, total_s) in after.pop("operations").items():
            calls_before, total_before_s = before["operations"].get((side, name), (0, 0.0))
            if calls > calls_before:
                operations.append(
                    {
                        "side": side,
                        "operation": name,
                        "calls": calls - calls_before,
                        "total_s": total_s - total_before_s,
                    }
                )
        return {**{name: value - before[name] for name, value in after.items()}, "operations": operations}


if __name__ == "__main__":
    sys.exit(serve(Ours))
