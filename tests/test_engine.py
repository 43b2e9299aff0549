"""How blocks take turns: the oldest submission first, and nobody waits for a block that waits for itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm.tee.engine import interleave


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_lanes_wait_for_their_submissions_in_ascending_order(programmes):
    submitted, waited, done = [0], [], []

    def lane(number, steps):
        for count in steps:
            for _ in range(count):
                submitted[0] += 1
            mine = submitted[0]
            yield mine
            assert waited[-1] == mine
        done.append(number)

    interleave([lane(number, steps) for number, steps in enumerate(programmes)], waited.append)
    assert sorted(done) == list(range(len(programmes)))
    assert waited == sorted(waited)
    assert len(waited) == sum(len(steps) for steps in programmes)


@given(st.integers(1, 6), st.integers(1, 5))
def test_a_lane_that_is_stuck_goes_on_after_the_one_before_it(lanes, layers):
    reached = [-1] * lanes
    order, sequence = [], [0]

    def lane(number):
        for layer in range(layers):
            while number > 0 and reached[number - 1] < layer:
                yield None
            order.append((layer, number))
            reached[number] = layer
            sequence[0] += 1
            yield sequence[0]

    interleave([lane(number) for number in range(lanes)], lambda _: None)
    for number in range(1, lanes):
        for layer in range(layers):
            assert order.index((layer, number - 1)) < order.index((layer, number))
