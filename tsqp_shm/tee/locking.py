"""What of a session's private memory is kept from being swapped out, beside its keys."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from typing import Any

from tsqp_shm import _native
from tsqp_shm.shm.slots import Slots


def lock_private(slots: Slots, caches: Iterable[_native.KeyValueCache], *, stock: bool) -> dict[str, Any]:
    """Locks the private slots and the caches of keys and values, as far as the limit on locked memory allows.

    What the limit has no room for stays as it is: a session runs without, and says so. A cache counts with all that it
    may hold, and takes memory as before only when it is used. What Python itself holds of a pass, token ids and the
    weights are not locked; whether anything is swapped out at all is the machine's affair.

    Args:
        slots: of one connection; those of the next are locked anew.
        caches: of all layers.
        stock: whether the stock of pads has been locked, which is made before.

    Returns:
        For each kind whether it is locked, and the first "reason" why something is not, or None. Keys are locked in
        every session, or there is none.
    """
    errors = {"slots": slots.lock(), "caches": next(filter(None, (cache.lock() for cache in caches)), 0)}
    locked: dict[str, Any] = {"keys": True, "stock": stock, **{what: not error for what, error in errors.items()}}
    error = next(filter(None, errors.values()), 0)
    refused = ", ".join(what for what, is_locked in locked.items() if not is_locked)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    most = "no limit" if limit == resource.RLIM_INFINITY else f"the limit is {limit >> 10:,} KiB"
    why = f"{os.strerror(error)}; " if error else ""
    advice = "raise it with ulimit -l or LimitMEMLOCK"
    locked["reason"] = f"not locked: {refused} ({why}{most}, {advice})" if refused else None
    return locked
