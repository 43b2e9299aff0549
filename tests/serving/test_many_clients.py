"""Sixty-four clients on eight sequences, from 10 to 2,000 tokens: each gets what it gets alone, and none starves."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from servers import demo_server

pytestmark = pytest.mark.serving

NUM_CLIENTS = 64
BUDGET = 64


@pytest.fixture(scope="module")
def asked() -> list[dict[str, object]]:
    generator = np.random.default_rng(5)
    lengths = np.exp(generator.uniform(np.log(10), np.log(2000), NUM_CLIENTS)).astype(int)
    return [
        {"prompt": generator.integers(1000, 40000, length).tolist(), "max_tokens": int(generator.integers(8, 48)),
         "temperature": 0, "ignore_eos": True}
        for length in lengths
    ]  # fmt: skip


@pytest.mark.parametrize(("mode", "flags"), [("plain", ("--dtype", "float32", "--device", "cpu")), ("verified", ())])
def test_each_of_64_clients_gets_what_it_gets_alone_and_none_starves(demo_model, asked, mode, flags):
    arguments = ("--mode", mode, *flags, "--max-num-seqs", 8, "--max-queue", NUM_CLIENTS, "--prefill-budget", BUDGET)
    with demo_server(demo_model, *arguments) as server:
        alone = [server.post("/v1/completions", body)[1]["choices"][0]["text"] for body in asked]
        together: list[str] = [""] * NUM_CLIENTS
        gaps: list[float] = []
        waits: list[float] = []

        def client(index: int) -> None:
            began = last = time.monotonic()
            with server.streaming("/v1/completions", asked[index]) as stream:
                for number, event in enumerate(stream):
                    now = time.monotonic()
                    (gaps if number else waits).append(now - last if number else now - began)
                    last = now
                    together[index] += event["choices"][0]["text"]

        threads = [threading.Thread(target=client, args=[index]) for index in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == alone
        p50, p99 = np.percentile(gaps, [50, 99])
        first, longest = np.median(waits), max(waits)
        print(f"{mode}: between tokens p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, max {max(gaps) * 1e3:.1f} ms")
        print(f"{mode}: to the first token p50 {first:.2f} s, max {longest:.2f} s")
        assert server.metric("tsqp:num_requests_running") == server.metric("tsqp:num_requests_waiting") == 0
