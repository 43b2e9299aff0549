"""GET /metrics: what the session counts, in Prometheus' words. Labels hold names of ours alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from tsqp_shm.metrics import Counter, Gauge, Histogram
from tsqp_shm.metrics import Metric as Counted
from tsqp_shm.serve.front import Front


async def metrics(request: Request) -> Response:
    """Without a key, as whoever scrapes has none: nothing of a request is in it but counts, lengths and times."""
    front: Front = request.app.state.front
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Session(await front.look(front.metrics)))
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class _Session:
    def __init__(self, counted: Iterable[Counted]) -> None:
        self._counted = counted

    def collect(self) -> Iterator[Metric]:
        for name, group in groupby(self._counted, key=lambda each: each.name):
            yield _family(name, list(group))


def _family(name: str, counted: list[Counted]) -> Metric:
    labels = list(counted[0].labels)
    words = name.partition(":")[2].replace("_", " ")
    first = counted[0]
    if isinstance(first, Histogram):
        histograms = HistogramMetricFamily(name, words, labels=labels)
        for each in counted:
            assert isinstance(each, Histogram)
            histograms.add_metric(list(each.labels.values()), list(each.buckets.items()), each.sum)
        return histograms
    is_counter = isinstance(first, Counter)
    family = (
        CounterMetricFamily(name, words, labels=labels) if is_counter else GaugeMetricFamily(name, words, labels=labels)
    )
    for each in counted:
        assert isinstance(each, (Counter, Gauge))
        family.add_metric(list(each.labels.values()), each.value)
    return family
