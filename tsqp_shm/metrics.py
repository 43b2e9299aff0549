"""What `LLM.get_metrics` gives: the types of vLLM's reader of its own metrics, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Attributes:
    name: without the ending that a Prometheus page puts behind a counter's.
    labels: what distinguishes metrics of one name; never a user's text.
    """

    name: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Counter(Metric):
    """What has happened since the session began: it only grows.

    Example:
        >>> generated = [metric for metric in llm.get_metrics() if metric.name == "tsqp:generation_tokens"]
        >>> generated[0].value > 0
        True
    """

    value: int


@dataclass(frozen=True)
class Gauge(Metric):
    """What there is at the moment.

    Example:
        >>> [metric.value for metric in llm.get_metrics() if metric.name == "tsqp:num_requests_running"]
        [0]
    """

    value: float


@dataclass(frozen=True)
class Histogram(Metric):
    """Observations, counted by size.

    Attributes:
        count, sum: of all observations.
        buckets: by upper bound as Prometheus writes it, how many are no larger; "+Inf" has all.

    Example:
        >>> times = [metric for metric in llm.get_metrics() if metric.name == "tsqp:time_to_first_token_seconds"]
        >>> times[0].count == times[0].buckets["+Inf"] > 0
        True
    """

    count: int
    sum: float
    buckets: dict[str, int]
