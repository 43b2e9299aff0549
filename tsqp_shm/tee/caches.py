"""The caches of a session: which are free, and which are kept for the next request of whoever has asked before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Keeper:
    """Whose requests follow on each other, as the turns of a conversation do: what lies in the cache of one is there
    for the next.

    Attributes:
        is_closed: no other will follow.
    """

    def __init__(self) -> None:
        self.is_closed = False


class Cache(NamedTuple):
    """Attributes:
    sequence: its index.
    token_ids: what lies in it, from position 0 on.
    request: that which has put it there, by its number in the session's evidence; None: none is written.
    """

    sequence: int
    token_ids: Sequence[int] = ()
    request: int | None = None


class Caches:
    """So many; each is free, taken, or kept for somebody until he comes or it is needed for another."""

    def __init__(self, count: int) -> None:
        self._free = list(reversed(range(count)))
        # The one that was used longest ago comes first.
        self._kept: dict[Keeper, Cache] = {}

    @property
    def num_free(self) -> int:
        """How many can be taken, the kept ones included."""
        return len(self._free) + len(self._kept)

    def take(self, keeper: Keeper | None = None) -> Cache:
        """The one that is kept for him, else a free one, else that of another which was used longest ago, with nothing
        in it. There has to be one."""
        if keeper in self._kept:
            return self._kept.pop(keeper)
        if not self._free:
            self._free.append(self._kept.pop(next(iter(self._kept))).sequence)
        return Cache(self._free.pop())

    def give_back(self, sequence: int) -> None:
        self._free.append(sequence)

    def keep(self, keeper: Keeper, cache: Cache) -> None:
        """Gives one back, for him before others."""
        if keeper.is_closed:
            self.give_back(cache.sequence)
        else:
            self._kept[keeper] = cache

    def close(self, keeper: Keeper) -> None:
        """Nothing is kept for him any more."""
        keeper.is_closed = True
        if keeper in self._kept:
            self.give_back(self._kept.pop(keeper).sequence)

    def forget(self) -> None:
        """What lay in them is lost."""
        self._free += [cache.sequence for cache in self._kept.values()]
        self._kept.clear()
