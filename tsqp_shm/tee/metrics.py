"""A session's metrics, under vLLM's names where it has one: what `LLM.get_metrics` gives.

They are put together when somebody asks, out of what is counted anyway, and nobody waits for the thread that runs the
steps. `docs/architecture.md` has a line for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tsqp_shm.metrics import Counter, Gauge, Histogram, Metric
from tsqp_shm.tee.request_tallies import ENDINGS, histogram
from tsqp_shm.tee.statistics import Statistics

PREFIX = "tsqp:"
# Round trips are counted by their bits: up to half a microsecond, and up to 17 seconds.
_FEWEST_BITS, _MOST_BITS = 9, 34


class Occupancy(NamedTuple):
    """What there is of requests at the moment.

    Attributes:
        running, waiting: completions.
        sequences, free_sequences: caches, and those of them that nobody has.
    """

    running: int
    waiting: int
    sequences: int
    free_sequences: int


def metrics(
    statistics: Statistics, occupancy: Occupancy, pads: Mapping[str, Any] | None, *, has_border: bool
) -> list[Metric]:
    """Args:
    pads: what has become of them; None: there are none.
    has_border: whether there is another side, to which bytes and doorbells go.
    """
    found = [*_gauges(occupancy), *_requests(statistics)]
    if has_border:
        found += _border(statistics)
    if pads is not None:
        found += _pads(pads)
    return found


def _gauges(occupancy: Occupancy) -> Iterator[Metric]:
    taken = 1 - occupancy.free_sequences / occupancy.sequences
    yield Gauge(f"{PREFIX}num_requests_running", {}, occupancy.running)
    yield Gauge(f"{PREFIX}num_requests_waiting", {}, occupancy.waiting)
    yield Gauge(f"{PREFIX}kv_cache_usage_perc", {}, taken)


def _requests(statistics: Statistics) -> Iterator[Metric]:
    requests = statistics.requests
    yield Counter(f"{PREFIX}prompt_tokens", {}, requests.prompt_tokens)
    yield Counter(f"{PREFIX}generation_tokens", {}, requests.generation_tokens)
    yield Counter(f"{PREFIX}prefix_cache_queries", {}, requests.begun_tokens)
    yield Counter(f"{PREFIX}prefix_cache_hits", {}, requests.cached_tokens)
    for reason, word in ENDINGS.items():
        yield Counter(f"{PREFIX}request_success", {"finished_reason": word}, requests.ended[reason])
    for name, distribution in (
        ("time_to_first_token_seconds", requests.first_token_s),
        ("inter_token_latency_seconds", requests.between_tokens_s),
        ("e2e_request_latency_seconds", requests.whole_s),
        ("request_queue_time_seconds", requests.queue_s),
        ("request_prompt_tokens", requests.prompts),
        ("request_generation_tokens", requests.answers),
    ):
        yield distribution.histogram(PREFIX + name)


def _border(statistics: Statistics) -> Iterator[Metric]:
    submissions = statistics.submissions
    yield _round_trips(submissions.round_trips_by_bits, submissions.round_trips_ns)
    yield Counter(f"{PREFIX}doorbells", {}, submissions.doorbells)
    yield Counter(f"{PREFIX}boundary_bytes", {"to": "gpu"}, submissions.bytes_to_gpu)
    yield Counter(f"{PREFIX}boundary_bytes", {"to": "tee"}, submissions.bytes_to_tee)
    yield Counter(f"{PREFIX}gpu_restarts", {}, statistics.gpu_restarts)


def _round_trips(by_bits: list[int], total_ns: int) -> Histogram:
    # What has so many bits is below 2 to their power.
    bounds = [2**bits / 1e9 for bits in range(_FEWEST_BITS, _MOST_BITS + 1)]
    counts = [
        sum(by_bits[: _FEWEST_BITS + 1]), *by_bits[_FEWEST_BITS + 1 : _MOST_BITS + 1], sum(by_bits[_MOST_BITS + 1 :])
    ]  # fmt: skip
    return histogram(f"{PREFIX}doorbell_roundtrip_seconds", bounds, counts, total_ns / 1e9)


def _pads(pads: Mapping[str, Any]) -> Iterator[Metric]:
    yield Gauge(f"{PREFIX}pad_stock_rows", {}, pads["stock_rows"])
    yield Gauge(f"{PREFIX}pad_stock_capacity_rows", {}, pads["capacity_rows"])
    for what in ("made", "used", "burned"):
        yield Counter(f"{PREFIX}pads_{what}", {}, pads[what])
    yield Counter(f"{PREFIX}products_computed_in_tee", {}, pads["tee_products"])
