#!/usr/bin/env python
"""Hours of mixed use in minutes: does anything grow?

One `LLM` takes random requests: batches, streams that are closed in the middle, deadlines that pass, Ctrl-C in the
middle of a step, and GPU processes that are killed. Between them it is looked at idle: resident memory, file
descriptors and threads of both processes, slots handed over, caches in use, and what lies in /dev/shm. After a warm-up
none of these may have grown at the end.

    scripts/soak.py --minutes 60
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from script_flags import ScriptParser

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.bench.shapes import write_shape
from tsqp_shm.bench.tables import print_columns
from tsqp_shm.errors import TsqpError
from tsqp_shm.shm.posix.folder import sessions_folder
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.tee.updates import Update

SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024, "eos_token_id": 0,
}  # fmt: skip
MAX_MODEL_LEN = 512
MAX_NUM_SEQS = 6
MAX_BATCH_TOKENS = 256
# Of the run: what is measured before counts as warm-up, and the ends of the rest are compared.
WARM_UP = 0.25
# Of resident memory, from the first quarter of what is compared to the last: an allocator keeps what it was given.
ALLOWED_GROWTH = 0.05
RESTART_EVERY_S = 20.0


class Soak:
    """One LLM and what is done to it."""

    def __init__(self, llm: LLM, draw: random.Random) -> None:
        self._llm = llm
        self._draw = draw
        self.done: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        # Flat, as a list of dicts would grow by a megabyte an hour in the process that is measured.
        self._names: tuple[str, ...] = ()
        self._numbers = array("d")

    @property
    def samples(self) -> list[dict[str, float]]:
        width = max(1, len(self._names))
        rows = (self._numbers[at : at + width] for at in range(0, len(self._numbers), width))
        return [dict(zip(self._names, row, strict=True)) for row in rows]

    def run(self, seconds: float, show: Callable[[str], None]) -> None:
        uses = [self.batch, self.closed_stream, self.two_streams, self.deadline, self.ctrl_c, self.wrong]
        started = sampled = killed = time.monotonic()
        while (now := time.monotonic()) - started < seconds:
            use = self._draw.choices(uses, (4, 2, 2, 2, 1, 1))[0]
            if now - killed > RESTART_EVERY_S:
                use, killed = self.killed_gpu, now
            use()
            self.done[use.__name__] += 1
            if now - sampled > min(2.0, seconds / 40):
                sampled = now
                sample = {"at_s": now - started, **self.look()}
                assert self._names in ((), tuple(sample))
                self._names = tuple(sample)
                self._numbers.extend(sample.values())
                show(f"{now - started:.0f}/{seconds:.0f} s {dict(self.done)}")

    def batch(self) -> None:
        outputs = self._llm.generate(self._prompts(self._draw.randint(1, 2 * MAX_NUM_SEQS)), self._params())
        self.endings.update(output.outputs[0].finish_reason for output in outputs)

    def closed_stream(self) -> None:
        completion = self._llm.start(self._prompt(), self._params())
        updates: SimpleQueue[Update] = SimpleQueue()
        self._llm.runtime.add([completion], updates.put)
        for _ in range(self._draw.randint(1, 8)):
            if updates.get().is_last:
                break
        self._llm.runtime.cancel([completion])
        self.endings[completion.finish_reason or "cancelled"] += 1

    def two_streams(self) -> None:
        completions = [self._llm.start(self._prompt(), self._params()) for _ in range(2)]
        for completion in completions:
            list(self._llm.stream_completion(completion))
        self.endings.update(completion.finish_reason or "" for completion in completions)

    def deadline(self) -> None:
        params = SamplingParams(
            max_tokens=400, ignore_eos=True, deadline_s=self._draw.uniform(1e-4, 0.2), temperature=0
        )
        outputs = self._llm.generate(self._prompts(3), params)
        self.endings.update(output.outputs[0].finish_reason for output in outputs)

    def ctrl_c(self) -> None:
        timer = threading.Timer(self._draw.uniform(0, 0.05), os.kill, (os.getpid(), signal.SIGINT))
        with suppress(KeyboardInterrupt):
            timer.start()
            self._llm.generate(self._prompts(4), SamplingParams(max_tokens=200, ignore_eos=True, temperature=0))
            # It came too late for that.
            timer.join()
            time.sleep(1)
        timer.join()

    def wrong(self) -> None:
        for prompt in ([], [SHAPE["vocab_size"]], [1] * MAX_MODEL_LEN):
            with suppress(TsqpError):
                self._llm.generate([prompt])

    def killed_gpu(self) -> None:
        """The tokens must be those of a run without the fault: each prompt alone, before it."""
        prompts, params = self._prompts(MAX_NUM_SEQS), SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)
        expected = self._llm.generate(prompts, params)
        pid = self._llm.bring_up()["processes"]["gpu"]["pid"]
        timer = threading.Timer(self._draw.uniform(0, 0.1), os.kill, (pid, signal.SIGKILL))
        timer.start()
        outputs = self._llm.generate(prompts, params)
        timer.join()
        # Where it was killed too late, these are the first that notice.
        outputs = [outputs, self._llm.generate(prompts, params)]
        for given in outputs:
            if [o.outputs[0].token_ids for o in given] != [o.outputs[0].token_ids for o in expected]:
                raise SystemExit("soak: the tokens after a restart are not those of before")

    def look(self) -> dict[str, float]:
        """The state of both processes, idle: what an interrupted step left in flight is waited for first."""
        llm = self._llm
        load = llm.runtime.load()
        facts: dict[str, float] = {}
        pids = {"tee": os.getpid(), "gpu": llm.bring_up()["processes"]["gpu"]["pid"]}
        for role, pid in pids.items():
            process = Path(f"/proc/{pid}")
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            facts[f"{role}_private_mib"] = int(status["RssAnon"].split()[0]) / 1024
            facts[f"{role}_descriptors"] = len(list((process / "fd").iterdir()))
            facts[f"{role}_threads"] = int(status["Threads"])
        facts["slots_handed_over"] = load.lent_slots
        facts["caches_in_use"] = MAX_NUM_SEQS - load.free_sequences
        facts["waiting"] = load.waiting
        session = llm.bring_up()["session"]
        facts["arenas"] = len(list(Path("/dev/shm").glob(arena_name(session)[1:] + "*")))
        facts["files_of_the_session"] = len(list((sessions_folder() / session).iterdir()))
        return facts

    def _prompt(self) -> list[int]:
        length = self._draw.choice((1, 7, 60, 200, MAX_MODEL_LEN - 40))
        return [self._draw.randrange(SHAPE["vocab_size"]) for _ in range(length)]

    def _prompts(self, number: int) -> list[list[int]]:
        return [self._prompt() for _ in range(number)]

    def _params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self._draw.randint(1, 40),
            temperature=self._draw.choice((0.0, 1.0)),
            seed=self._draw.randrange(1000),
        )


def judge(samples: list[dict[str, float]]) -> list[dict[str, Any]]:
    """One row for each quantity: its median at the beginning and at the end of what is compared, and what is wrong."""
    kept = samples[int(len(samples) * WARM_UP) :]
    quarter = max(1, len(kept) // 4)
    rows = []
    for name in (name for name in samples[0] if name != "at_s"):
        values = [sample[name] for sample in kept]
        first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
        allowed = first * (1 + ALLOWED_GROWTH) + 1 if name.endswith("_mib") else first
        rows.append({"quantity": name, "first": first, "last": last, "most": max(values), "has_grown": last > allowed})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    cells = [
        [row["quantity"], *(f"{row[name]:.1f}" for name in ("first", "last", "most")), "grown" * row["has_grown"]]
        for row in rows
    ]
    print_columns(["idle, median of", "first quarter", "last quarter", "most", ""], cells)


def parse_arguments() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--minutes", type=float, metavar="N", default=60.0, help="how long (60)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the requests (a new one)")
    parser.add_argument("--json", metavar="FILE", help="also write every sample")
    arguments = parser.parse_args()
    if not 0 < arguments.minutes < float("inf"):
        parser.error(f"argument --minutes: {arguments.minutes} is no time that ends")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    seed = arguments.seed if arguments.seed is not None else random.randrange(1 << 32)

    def show(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS, "max_batch_tokens": MAX_BATCH_TOKENS}
    with tempfile.TemporaryDirectory(prefix="tsqp-soak") as folder:
        write_shape(Path(folder), SHAPE)
        with LLM(folder, dtype="float32", restart_gpu=1_000_000, **limits) as llm:
            soak = Soak(llm, random.Random(seed))
            soak.run(arguments.minutes * 60, show)
            restarts, doorbells = llm.statistics.gpu_restarts, llm.statistics.doorbells
    show("")
    rows = judge(soak.samples)
    print(f"{arguments.minutes:g} minutes, seed {seed}: {dict(soak.done)}")
    print(f"ended by {dict(soak.endings)}; {restarts} restarts of the GPU process, {doorbells:,} doorbells")
    print_table(rows)
    if arguments.json:
        document = {
            "minutes": arguments.minutes, "seed": seed, "done": soak.done, "endings": soak.endings,
            "restarts": restarts, "doorbells": doorbells, "rows": rows, "samples": soak.samples,
        }  # fmt: skip
        Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")
    return 1 if any(row["has_grown"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
