"""What a session says of its requests: their ids and times, and its metrics, held against what came out."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from models import RandomModel, model_folder, with_tokenizer

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import RequestError, TsqpError
from tsqp_shm.metrics import Counter, Gauge, Histogram, Metric
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.request_tallies import Distribution

MODEL = RandomModel("llama", {"vocab_size": 256})
DOCUMENT = Path(__file__).parents[1] / "docs" / "architecture.md"


def asked(**params) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 6, "temperature": 0, "ignore_eos": True, **params})


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(model_folder(MODEL), mode="tee-only", max_model_len=128, max_num_seqs=2) as llm:
        yield llm


def metric(llm: Any, name: str, **labels: str) -> Metric:
    metrics = llm.get_metrics() if isinstance(llm, LLM) else llm.metrics()
    (found,) = [each for each in metrics if (each.name, each.labels) == (f"tsqp:{name}", labels)]
    return found


def value(llm: Any, name: str, **labels: str) -> float:
    found = metric(llm, name, **labels)
    assert isinstance(found, (Counter, Gauge))
    return found.value


def test_requests_are_numbered_in_the_order_in_which_they_came(llm):
    assert [output.request_id for output in llm.generate([[5], [6, 7]], asked())] == ["0", "1"]
    assert llm.start([5]).request_id == "2"
    (output,) = llm.generate([5], asked(n=2, temperature=1.0))
    assert output.request_id == "3"
    with pytest.raises(RequestError):
        llm.generate([[5], [999]])
    with closing(llm.stream([5], asked())):
        pass
    ids = [int(output.request_id) for output in llm.generate([[5]] * 3, asked())]
    assert ids == list(range(ids[0], ids[0] + 3))
    assert ids[0] > 4


def test_an_output_has_its_times_in_their_order(llm):
    before, before_s = time.time(), time.monotonic()
    outputs = llm.generate([[5] * 20, [6], [7]], [asked(), asked(max_tokens=1), asked(n=3, temperature=1.0)])
    after, after_s = time.time(), time.monotonic()
    for output in outputs:
        metrics = output.metrics
        tokens = [each.token_ids for each in output.outputs]
        assert metrics.num_generation_tokens == sum(map(len, tokens))
        assert before <= metrics.arrival_time <= after
        moments = [before_s, metrics.queued_ts, metrics.scheduled_ts, metrics.first_token_ts, metrics.last_token_ts]
        assert all(one <= other for one, other in pairwise([*moments, after_s]))
        assert 0 < metrics.first_token_latency <= metrics.first_token_ts - before_s
    assert outputs[1].metrics.first_token_ts == outputs[1].metrics.last_token_ts
    # Two at a time: the others waited for a place.
    assert outputs[2].metrics.scheduled_ts > outputs[2].metrics.queued_ts


def test_what_has_not_happened_has_no_time(llm):
    (output,) = llm.generate([5], asked(max_tokens=None, deadline_s=1e-9))
    metrics = output.metrics
    assert output.outputs[0].finish_reason == "deadline"
    assert metrics.num_generation_tokens == metrics.scheduled_ts == metrics.first_token_ts == 0
    assert metrics.first_token_latency == metrics.last_token_ts == 0
    assert metrics.queued_ts > 0


def test_counters_and_histograms_are_the_sums_of_what_came_out(llm):
    params = [asked(), asked(max_tokens=1), asked(n=2, temperature=1.0), asked(max_tokens=9)]
    outputs = llm.generate([[5] * 20, [6], [7, 8], [9] * 50], params)
    outputs += llm.generate([5, 6, 7], asked(deadline_s=1e-9))
    outputs += llm.generate([5], asked(max_tokens=30, stop_token_ids=list(range(256))))
    lengths = [len(each.token_ids) for output in outputs for each in output.outputs]
    prompts = [len(output.prompt_token_ids) for output in outputs for each in output.outputs if each.token_ids]
    assert value(llm, "prompt_tokens") == sum(prompts)
    assert value(llm, "generation_tokens") == sum(lengths)
    reasons = [each.finish_reason for output in outputs for each in output.outputs]
    for reason in ("stop", "length", "deadline", "abort", "error"):
        assert value(llm, "request_success", finished_reason=reason) == reasons.count(reason)
    counts = {
        "time_to_first_token_seconds": len(prompts),
        "inter_token_latency_seconds": sum(lengths) - len(prompts),
        "e2e_request_latency_seconds": len(lengths),
        "request_queue_time_seconds": len(prompts),
        "request_prompt_tokens": len(lengths),
        "request_generation_tokens": len(lengths),
    }
    for name, count in counts.items():
        histogram = metric(llm, name)
        assert isinstance(histogram, Histogram)
        assert histogram.count == histogram.buckets["+Inf"] == count, name
        assert list(histogram.buckets.values()) == sorted(histogram.buckets.values())
    assert metric(llm, "request_generation_tokens").sum == sum(lengths)
    whole, first, between = (
        metric(llm, f"{name}_seconds").sum
        for name in ("e2e_request_latency", "time_to_first_token", "inter_token_latency")
    )
    # The rest is what the one had to wait that got no token.
    assert first + between <= whole <= first + between + 0.5 * len(lengths)


def test_gauges_say_what_is_at_the_moment(fast):
    with fast.runtime(model_folder(MODEL), max_model_len=64, max_num_seqs=2) as runtime:

        def gauges() -> list[float]:
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            return [value(runtime, name) for name in names]

        assert gauges() == [0, 0, 0]
        first, *others = completions = [Completion([5], asked(), 6, [], None, vocab_size=256) for _ in range(3)]
        runtime.add(completions, lambda update: None)
        runtime.step()
        # There are caches for two.
        assert gauges() == [2, 1, 1]
        runtime.cancel([first, *others[1:]])
        while runtime.step():
            assert gauges() == [1, 0, 0.5]
        assert gauges() == [0, 0, 0]
        assert value(runtime, "request_success", finished_reason="abort") == 2
        assert value(runtime, "request_success", finished_reason="length") == 1


def test_metrics_outlive_the_session_and_stay_in_its_process(llm, forked):
    llm.generate([5], asked())
    with closing(llm.stream([5], asked(max_tokens=100))) as pieces:
        next(pieces, None)

    def ask():
        with pytest.raises(TsqpError, match="a forked child has to make its own"):
            llm.get_metrics()

    forked(ask).join()
    llm.close()
    assert value(llm, "request_success", finished_reason="length") >= 1
    assert value(llm, "generation_tokens") >= 6
    assert value(llm, "num_requests_running") == value(llm, "kv_cache_usage_perc") == 0


def test_what_crosses_is_counted_as_in_the_statistics(fast):
    settings = {"pad_stock": "200", "max_model_len": 64, "max_num_seqs": 2}
    with fast.llm(model_folder(MODEL), mode="blinded", **settings) as llm:
        llm.generate([[5] * 20, [6]], asked())
        stats = llm.stats()
        assert value(llm, "boundary_bytes", to="gpu") == stats["bytes"]["to_gpu"] > 0
        assert value(llm, "boundary_bytes", to="tee") == stats["bytes"]["to_tee"] > 0
        assert value(llm, "doorbells") == stats["doorbell"]["rung"]
        assert value(llm, "gpu_restarts") == 0
        newest = llm.statistics.submissions.newest_round_trips()
        histogram = metric(llm, "doorbell_roundtrip_seconds")
        assert histogram.count == len(newest)
        assert histogram.sum == pytest.approx(sum(newest) / 1e9)
        for bound, count in histogram.buckets.items():
            assert count == sum(trip / 1e9 < float(bound) for trip in newest)
        pads = stats["pads"]
        assert value(llm, "pad_stock_capacity_rows") == pads["capacity_rows"]
        assert 0 < value(llm, "pads_used") == pads["used"] <= value(llm, "pads_made") - value(llm, "pads_burned")
        assert value(llm, "products_computed_in_tee") == pads["tee_products"]
        before = llm.get_metrics()
    counters = [each for each in before if not isinstance(each, Gauge)]
    # The last doorbell is the one that ends the GPU process.
    after = [each for each in llm.get_metrics() if not isinstance(each, Gauge)]
    assert [each.name for each in after] == [each.name for each in counters]
    assert value(llm, "request_success", finished_reason="length") == 2
    names = {each.name for each in before}
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `tsqp:")]
    assert names == {name for row in rows for name in re.findall(r"`(tsqp:\w+)`", row)}


def test_a_conversation_says_what_its_cache_has_spared(fast, demo_model):
    model = with_tokenizer(model_folder(RandomModel("llama", {"vocab_size": 49152})), demo_model)
    with fast.llm(model, dtype="float32", max_model_len=256) as llm, llm.conversation() as conversation:
        messages = [{"role": "user", "content": "Hello"}]
        first = conversation.chat(messages, asked())
        second = conversation.chat([*messages, {"role": "user", "content": "and now?"}], asked())
        assert second.num_cached_tokens > 0
        prompts = sum(len(each.prompt_token_ids) for each in (first, second))
        assert value(llm, "prefix_cache_queries") == value(llm, "prompt_tokens") == prompts
        assert value(llm, "prefix_cache_hits") == second.num_cached_tokens


def test_a_distribution_counts_what_is_no_larger_than_a_bound():
    distribution = Distribution((1.0, 2.5))
    for observed in (0.5, 1.0, 1.1, 2.5, 2.6, 100):
        distribution.observe(observed)
    histogram = distribution.histogram("x")
    assert histogram == Histogram("x", {}, 6, pytest.approx(107.7), {"1.0": 2, "2.5": 4, "+Inf": 6})
