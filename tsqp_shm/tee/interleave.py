"""How blocks take turns: while the GPU process has one of them, another is here, so that neither side waits for the
other."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

# What a task yields on its way: the number of the submission it waits for, or None where it cannot go on before another
# task has.
Task = Iterator[int | None]


def interleave(tasks: Sequence[Task], wait: Callable[[int], object]) -> None:
    """Runs tasks to their ends, each going on when the submission that it waits for is complete, the oldest first.

    Args:
        wait: called with the sequence numbers that tasks yield, in ascending order.
    """
    awaited: list[tuple[int, int]] = []
    stuck = list(range(len(tasks)))
    while stuck or awaited:
        if awaited:
            sequence, index = heapq.heappop(awaited)
            wait(sequence)
            going = [index, *stuck]
        else:
            going = stuck
        stuck = []
        for index in going:
            try:
                found = next(tasks[index])
            except StopIteration:
                continue
            if found is None:
                stuck.append(index)
            else:
                heapq.heappush(awaited, (found, index))
