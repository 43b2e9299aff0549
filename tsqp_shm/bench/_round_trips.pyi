"""Native round trips between two processes, for `tsqp-shm bench latency`; see native/bench/round_trips.cpp."""

from typing_extensions import Buffer

class RoundTrips:
    """One side; holds the arena's mapping until it is gone. Units: nanoseconds a trip, the mean of each sample."""

    def __init__(self, arena: Buffer, leads: bool, patience_s: float = 20.0) -> None: ...
    def ping_pong(self, samples: int, trips: int) -> list[float]: ...
    def ring(self, samples: int, trips: int, spin_ns: int) -> list[float]: ...
