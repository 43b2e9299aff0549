"""What is learnt of service times: naps end before a steady peer does, and follow one that changes its pace."""

from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm.tee.service_times import MAX_NAP_NS, SHORTEST_WAIT_NS, ServiceTimes

TIMER_LATE_NS = 60_000


class Clock:
    """One operation after the other, each submitted when the one before is complete."""

    def __init__(self) -> None:
        self.naps = ServiceTimes()
        self.now_ns = 1_000_000

    def run(self, took_ns: int, size_bytes: int = 1_000_000, operation: str = "GATE_UP") -> tuple[int, int]:
        """Returns how long was slept, and how much later than complete it was seen."""
        submitted_ns = self.now_ns
        complete_ns = submitted_ns + took_ns
        nap_ns = self.naps.nap_ns(operation, size_bytes, submitted_ns, submitted_ns)
        looked_ns = submitted_ns + (nap_ns + TIMER_LATE_NS if nap_ns else 0)
        self.now_ns = max(looked_ns + 1000, complete_ns)
        self.naps.completed(operation, size_bytes, submitted_ns, nap_ns > 0, looked_ns, self.now_ns)
        return nap_ns, self.now_ns - complete_ns


@given(st.integers(SHORTEST_WAIT_NS, 5_000_000))
def test_a_steady_operation_is_slept_through_in_part_and_never_missed(took_ns):
    clock = Clock()
    assert clock.run(took_ns) == (0, 0)
    for _ in range(20):
        nap_ns, late_ns = clock.run(took_ns)
        assert took_ns / 3 < nap_ns <= MAX_NAP_NS
        assert late_ns == 0


@given(st.integers(1, SHORTEST_WAIT_NS - 50_000))
def test_a_short_operation_is_not_slept_through(took_ns):
    clock = Clock()
    assert all(clock.run(took_ns)[0] == 0 for _ in range(20))


@given(st.integers(400_000, 1 << 40), st.integers(1, 4_000_000))
def test_a_peer_that_becomes_faster_is_followed(slow_ns, fast_ns):
    clock = Clock()
    for _ in range(5):
        assert clock.run(slow_ns)[0] <= MAX_NAP_NS
    for _ in range(300):
        late_ns = clock.run(fast_ns)[1]
    assert late_ns <= 1000


def test_operations_and_magnitudes_are_learnt_apart():
    clock = Clock()
    clock.run(2_000_000, operation="DOWN")
    clock.run(2_000_000, size_bytes=1 << 20)
    assert clock.run(2_000_000, size_bytes=1 << 16)[0] == 0
    nap_ns, _ = clock.run(2_100_000, size_bytes=(1 << 20) * 21 // 20)
    assert nap_ns > 0
