"""How blocks take turns: while the GPU process has one of them, another is here, so that neither side waits for the
other."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence

# What a task yields on its way: the number of the submission it waits for, or None where it cannot go on before another
# task has.
Task = Iterator[int | None]


def interleave(tasks: Sequence[Task], wait: Callable[[int], object], *, staggered: bool = False) -> None:
    """Runs tasks to their ends, each going on when the submission that it waits for is complete, the oldest first.

    Args:
        wait: called with the sequence numbers that tasks yield, in ascending order.
        staggered: each task begins a wait later than the one before it. Tasks of the same shape that begin together
            stay together: all of them need this side at once, and then all of them the other.
    """
    awaited: list[tuple[int, int]] = []
    beginning = deque(range(len(tasks)))
    stuck: list[int] = []
    while stuck or awaited or beginning:
        if awaited:
            sequence, index = heapq.heappop(awaited)
            wait(sequence)
            going = [index, *stuck]
        else:
            going = stuck
        while beginning:
            going.append(beginning.popleft())
            if staggered:
                break
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
