"""When a wait may sleep before it looks: a long operation leaves the core to the threads that compute it.

A thread that yields between looks still takes its fair share of a core that it has to share, which on two cores was a
quarter of what the GPU process could have had (docs/performance.md). So an operation that is expected to last is slept
through in part. What is expected is what this side has seen; a peer that changes its pace costs at most MAX_NAP_NS
an operation.
"""

from __future__ import annotations

# A timer of a virtual machine is late by some 60 us: shorter waits are not worth one, and the rest is left for it.
SHORTEST_WAIT_NS = 300_000
SHARE = 0.7
MARGIN_NS = 50_000
MAX_NAP_NS = 5_000_000
# What was there when it was looked for had been there for an unknown time.
AT_ONCE_NS = 20_000


class ServiceTimes:
    """Learns how long operations last, by name and magnitude, in nanoseconds for each byte that they are handed."""

    def __init__(self) -> None:
        self._ns_per_byte: dict[tuple[str, int], float] = {}
        self._completed_ns = 0

    def nap_ns(self, operation: str, size_bytes: int, submitted_ns: int, now_ns: int) -> int:
        """How long to sleep before looking for the completion of the oldest submission; 0: not at all."""
        expected_ns = self._ns_per_byte.get((operation, size_bytes.bit_length()), 0.0) * size_bytes
        left_ns = max(submitted_ns, self._completed_ns) + expected_ns - now_ns
        return 0 if left_ns < SHORTEST_WAIT_NS else min(int(left_ns * SHARE) - MARGIN_NS, MAX_NAP_NS)

    def completed(
        self, operation: str, size_bytes: int, submitted_ns: int, napped: bool, looked_ns: int, now_ns: int
    ) -> None:
        """Learns from a completion that was looked for since `looked_ns` and seen at `now_ns`."""
        key = operation, size_bytes.bit_length()
        began_ns, self._completed_ns = max(submitted_ns, self._completed_ns), now_ns
        found = (now_ns - began_ns) / max(size_bytes, 1)
        known = self._ns_per_byte.get(key)
        if now_ns - looked_ns < AT_ONCE_NS:
            # It lasted less long than that; after a nap, the nap was too long.
            if known is not None:
                self._ns_per_byte[key] = min(known, found) * (0.9 if napped else 1.0)
        else:
            self._ns_per_byte[key] = found if known is None else known + (found - known) / 4
