"""This system as a contender: `python -m tsqp_shm.bench.ours`."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

from tsqp_shm.bench.cases import MODE_OF, Job, Turn
from tsqp_shm.bench.child import Answer, measured, serve
from tsqp_shm.errors import ContenderFailed
from tsqp_shm.llm import LLM
from tsqp_shm.modes import MODES
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.sampling_params import SamplingParams
from tsqp_shm.tee.updates import Update

# Between two looks at a stock that is being filled.
_LOOK_S = 0.05


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
        self._crosses, self._has_pads = mode.has_gpu_process, mode.has_pads
        self.processes = {"tee": os.getpid()}
        if mode.has_gpu_process:
            self.processes["gpu"] = int(facts["processes"]["gpu"]["pid"])
        self.device = str(facts.get("device", "cpu"))

    def repeat(self, turn: Turn) -> Answer:
        if not self._has_pads:
            return self._repeat(turn)
        filling = self._fill_stock(turn.stocked_rows) if turn.stocked_rows else None
        # Of all that it does, as who asks while it lasts holds it up.
        before = self._pads()
        answer = self._repeat(turn)
        after = self._pads()
        counts = {name: after[name] - before[name] for name in ("made", "used", "burned", "tee_products")}
        return {**answer, "pads": {"filling": filling, **counts}}

    def _repeat(self, turn: Turn) -> Answer:
        llm = self._llm
        prompts = turn.prompts(llm.spec.vocab_size)
        answer: Answer = {}
        if not turn.new_tokens:
            params = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0)
            for _ in range(-(-turn.lead_tokens // turn.tokens)):
                llm.generate([prompts[0]], params, use_tqdm=False)
            before = self._tallies()
            with measured(self.processes, answer):
                llm.generate([prompts[0]], params, use_tqdm=False)
            return {**answer, "tokens": turn.tokens, **self._since(before)}

        # The prefill is not to be counted in any number: all have their first token when the measured time begins.
        lead = turn.lead_tokens + 1
        params = SamplingParams(max_tokens=turn.new_tokens + lead, ignore_eos=True, temperature=0)
        completions = [llm.start(prompt, params) for prompt in prompts]
        updates: SimpleQueue[Update] = SimpleQueue()
        llm.runtime.add(completions, updates.put)
        made: Counter[Completion] = Counter()
        ended: set[Completion] = set()

        def take() -> None:
            update = llm.runtime.next_update(updates)
            made[update.completion] += len(update.token_ids)
            if update.is_last:
                ended.add(update.completion)

        while min(made[completion] for completion in completions) < lead:
            take()
        before, made_before = self._tallies(), made.total()
        with measured(self.processes, answer):
            while len(ended) < len(completions):
                take()
        return {**answer, "tokens": made.total() - made_before, **self._since(before)}

    def _fill_stock(self, rows: int) -> Answer:
        """Returns when so many rows have pads and no more are made; what that took.

        Raises:
            ContenderFailed: they are not made in time.
        """
        filling: Answer = {}
        deadline = time.monotonic() + self._job.timeout_s
        pads, made_before = self._pads(), -1
        made_first = pads["made"]
        with measured(self.processes, filling):
            while pads["stock_rows"] < rows or pads["made"] != made_before:
                if time.monotonic() > deadline:
                    raise ContenderFailed(self._job.name, f"{pads['stock_rows']} of {rows} rows of pads are made")
                time.sleep(_LOOK_S)
                made_before, pads = pads["made"], self._pads()
        return {**filling, "pads": pads["made"] - made_first}

    def _pads(self) -> dict[str, Any]:
        pads: dict[str, Any] = self._llm.stats()["pads"]
        return pads

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
        counted = {name: value - before[name] for name, value in after.items()}
        round_trip_us = self._llm.statistics.round_trip_us(50) if self._crosses else None
        return {**counted, "operations": operations, "round_trip_us": round_trip_us}


if __name__ == "__main__":
    sys.exit(serve(Ours))
