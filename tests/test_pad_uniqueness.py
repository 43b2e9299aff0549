"""No pad twice: of each row that leaves it is noted whose key blinds it, of which Linear and by which row of pads, over
everything that breaks a pass off."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from models import RandomModel, model_folder, random_token_ids
from test_blinded import ALL_CROSS, pads_of
from test_verified import GREEDY, LIMITS, PROMPTS

from tsqp_shm import LLM, SamplingParams, _native
from tsqp_shm.errors import TsqpError
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.pads import Pads

MANY_ROWS = 1_000_000


class Log:
    """A line for each run of rows that is about to leave; forked children write to the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, key_id: str, pads: _native.PadRows) -> None:
        os.write(self._fd, f"{os.getpid()} {key_id} {pads.linear} {pads.first_row} {pads.rows}\n".encode())

    def close(self) -> None:
        os.close(self._fd)

    def lines(self) -> Iterator[tuple[int, str, int, int, int]]:
        for line in self.path.read_text().splitlines():
            pid, key_id, linear, first_row, rows = line.split()
            yield int(pid), key_id, int(linear), int(first_row), int(rows)

    @property
    def num_rows(self) -> int:
        return sum(rows for *_, rows in self.lines())

    @property
    def processes(self) -> set[int]:
        return {pid for pid, *_ in self.lines()}

    def repeats(self) -> list[tuple[str, int, int]]:
        """The first row of each run that begins before an earlier one of its key and Linear ends."""
        runs = defaultdict(list)
        for _, key_id, linear, first_row, rows in self.lines():
            runs[key_id, linear].append((first_row, first_row + rows))
        found = []
        for (key_id, linear), ranges in runs.items():
            reached = 0
            for first, end in sorted(ranges):
                if first < reached:
                    found.append((key_id, linear, first))
                reached = max(reached, end)
        return found


@contextmanager
def noted(path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[..., Any] = Pads.take) -> Iterator[Log]:
    """Notes what this process blinds.

    Args:
        take: in the place of `Pads.take`.
    """
    log, keys = Log(path), {}
    quantise = Operations.quantise

    def taking(self: Pads, *arguments: Any) -> Any:
        pads = take(self, *arguments)
        if pads is not None:
            keys[id(pads)] = self.describe()["key_id"]
        return pads

    def noting(self: Operations, check: Any, x: Any, m: Any, first: int, rows: int, copy: Any, pads: Any) -> None:
        # Before anything of them leaves, so that a row of which nothing came counts as well.
        log.note(keys[id(pads)], pads)
        quantise(self, check, x, m, first, rows, copy, pads)

    with monkeypatch.context() as patched:
        patched.setattr(Pads, "take", taking)
        patched.setattr(Operations, "quantise", noting)
        try:
            yield log
        finally:
            log.close()


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


def interrupted(llm: LLM) -> None:
    """Ctrl-C in the middle of a completion."""
    timer = threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with suppress(KeyboardInterrupt):
        llm.generate([PROMPTS[1]], SamplingParams(max_tokens=50, ignore_eos=True, temperature=0))
        # It had ended before.
        time.sleep(10)
    timer.join()


def given_up(llm: LLM) -> None:
    """A stream that is closed in the middle, and a deadline in the middle of a step."""
    tokens = llm.stream_completion(llm.start(PROMPTS[2], GREEDY))
    next(tokens, None)
    tokens.close()
    llm.generate([PROMPTS[3]], SamplingParams(max_tokens=20, ignore_eos=True, temperature=0, deadline_s=0.003))


def beside_each_other(llm: LLM, number: int = 4) -> None:
    """Callers on threads of their own, whose rows share passes."""
    with ThreadPoolExecutor(number) as pool:
        asked = [pool.submit(llm.generate, [PROMPTS[index % len(PROMPTS)]], GREEDY) for index in range(number)]
        assert not wait(asked).not_done
    for one in asked:
        one.result()


def killed_at(fast, model: Path, moments: list[int]) -> Callable[[Any], None]:
    """Starts GPU processes that get SIGKILL at these submissions, each its own."""
    return lambda session: fast.start_gpu(model, session, dies_at=moments.pop(0) if moments else 0)


def test_no_row_is_blinded_twice_whatever_breaks_a_pass_off(fast, model, tmp_path, monkeypatch, forked):
    def in_child() -> None:
        with pytest.raises(TsqpError, match="forked child"):
            llm.generate([PROMPTS[0]], GREEDY)

    settings = {**ALL_CROSS, "pad_stock": 300, "restart_gpu": 1, "timeout_s": 30.0, **LIMITS}
    start_gpu = killed_at(fast, model, [60])
    with (
        noted(tmp_path / "log", monkeypatch) as log,
        LLM(model, mode="blinded", start_gpu=start_gpu, **settings) as llm,
    ):
        child = forked(in_child)
        beside_each_other(llm)
        given_up(llm)
        interrupted(llm)
        child.join()
        assert llm.statistics.gpu_restarts == 1
        pads = pads_of(llm)
    assert log.repeats() == []
    assert log.processes == {os.getpid()}
    assert pads["burned"] > 0
    assert log.num_rows == pads["used"] + pads["burned"]


def test_a_taker_that_is_one_behind_is_found(fast, model, tmp_path, monkeypatch):
    """Which the core refuses besides: what has blinded a row blinds no other."""
    last: dict[tuple[int, int], Any] = {}

    def behind(pads: Pads, linear: Any, rows: int) -> Any:
        fresh = take(pads, linear, rows)
        if fresh is None:
            return None
        given, last[linear.index, rows] = last.get((linear.index, rows), fresh), fresh
        return given

    take = Pads.take
    with (
        noted(tmp_path / "log", monkeypatch, behind) as log,
        fast.llm(model, mode="blinded", **ALL_CROSS, pad_stock=300, **LIMITS) as llm,
        pytest.raises(Exception, match="blinded"),
    ):
        llm.generate([PROMPTS[0]], GREEDY)
    assert log.repeats()
    last.clear()


def test_a_log_in_which_a_key_has_two_stocks_is_found(tmp_path):
    """As where a restart began to count anew."""
    linear = _native.FieldLinear(8, 4)
    keys = _native.PadKeys(b"session", b"digest", 0, 1)
    log = Log(tmp_path / "log")
    for rows in (2, 1):
        stock = _native.PadStock(keys, [linear], 4, 1)
        assert stock.wait(0, rows, 10.0)
        log.note(keys.key_id, stock.take(0, rows))
        assert bool(log.repeats()) == (rows == 1)
        stock.close()
    log.close()


@pytest.mark.long
def test_no_row_of_a_million_is_blinded_twice(fast, model, tmp_path, monkeypatch, forked):
    choose = random.Random(11)
    settings = {**ALL_CROSS, "pad_stock": 2000, "pad_threads": 2, "restart_gpu": 10_000, "timeout_s": 60.0, **LIMITS}
    moments = [choose.randrange(1, 4000) for _ in range(10_000)]
    children, rounds = [], 0
    with (
        noted(tmp_path / "log", monkeypatch) as log,
        LLM(model, mode="blinded", start_gpu=killed_at(fast, model, moments), **settings) as llm,
    ):
        while rounds % 20 or log.num_rows < MANY_ROWS:
            rounds += 1
            choose.choice([beside_each_other, beside_each_other, given_up, interrupted])(llm)
            llm.generate([list(random_token_ids(90, seed=rounds)) for _ in range(6)], GREEDY)
            if rounds % 20 == 0:
                children.append(forked(lambda: llm.generate([PROMPTS[0]], GREEDY)))
        pads, restarts = pads_of(llm), llm.statistics.gpu_restarts
    for child in children:
        assert child.wait() != 0
    print(f"{log.num_rows:,} rows, {pads['burned']:,} burned, {restarts} kills, {rounds} rounds, {len(children)} forks")
    assert log.repeats() == []
    assert log.processes == {os.getpid()}
    assert restarts > 10
    assert log.num_rows == pads["used"] + pads["burned"]
