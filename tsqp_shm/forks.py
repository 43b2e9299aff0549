"""What a forked child lets go of, because it is its parent's."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class ParentsOwn(Protocol):
    def leave_to_parent(self) -> None:
        """In a forked child: lets go of its copies of what the parent has, and changes nothing of the parent's."""


_owned: weakref.WeakSet[ParentsOwn] = weakref.WeakSet()


def leave_in_children(owned: ParentsOwn) -> None:
    """Has every child that this process forks from now on leave it to the parent."""
    _owned.add(owned)


def _leave_all() -> None:
    for owned in list(_owned):
        owned.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all)
