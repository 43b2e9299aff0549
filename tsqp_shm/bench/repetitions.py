"""Contenders brought up one after the other, and measured in turns."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tsqp_shm.bench.cases import Job
from tsqp_shm.bench.contenders import RunningContender
from tsqp_shm.bench.report import Answers
from tsqp_shm.errors import ConfigError
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.progress import Progress


def require_positions(jobs: list[Job], folder: Path) -> None:
    """Raises:
    ConfigError: the model does not know so many positions.
    """
    positions = ModelSpec.from_folder(folder).max_positions
    most = max((turn for job in jobs for turn in job.turns), key=lambda turn: turn.positions)
    if most.positions > positions:
        fitting = max(1, most.tokens - (most.positions - positions))
        raise ConfigError("tokens", most.tokens, f"about {fitting} at most, as the model knows {positions} positions")


def start_contenders(jobs: list[Job], stack: ExitStack, timeout_s: float, progress: Progress) -> list[RunningContender]:
    """Contenders that are ready, until the stack ends them.

    Raises:
        ContenderFailed: one cannot run, has died, or takes too long.
    """
    running = []
    for job in jobs:
        progress.show(f"loading {job.name}")
        contender = RunningContender.start(job)
        stack.callback(contender.stop)
        # One after another: loading together they would only take each other's cores and memory.
        contender.wait_ready(timeout_s)
        running.append(contender)
    return running


def repeat_in_turns(running: list[RunningContender], runs: int, timeout_s: float, progress: Progress) -> Answers:
    """A B A B; the first repetition of each is a warm-up. All have as many turns.

    Raises:
        ContenderFailed: as above.
    """
    numbers = range(len(running[0].job.turns))
    answers: Answers = {(each.name, each.job.turns[number]): [] for number in numbers for each in running}
    for run in range(runs + 1):
        label = f"run {run}/{runs}" if run else "warm-up"
        for number in numbers:
            for contender in running:
                turn = contender.job.turns[number]
                progress.show(f"{label} {turn.case} {contender.name}")
                answer = contender.repeat(turn, timeout_s)
                if run:
                    answers[contender.name, turn].append(answer)
    return answers
