"""Requests that nobody would write: none is a 500, and none leaves a sequence behind.

TSQP_SHM_FUZZ_S says for how long; `-m serving` has five minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["", "\ud800", "x" * 5000, "<|im_end|>", "{{7*7}}", "NaN", "-1"]),
)  # fmt: skip
JSON = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer", "king", ""])
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": ODD}), max_size=3)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES | ODD, "content": st.text(max_size=40) | PARTS | ODD}), max_size=4
)
SMALL = st.integers(-1, 6)
FIELDS = {
    "prompt": st.text(max_size=60)
    | st.lists(st.integers(-2, 60000), max_size=6)
    | st.lists(st.text(max_size=5), max_size=3)
    | JSON,
    "messages": MESSAGES | JSON,
    "tokens": st.lists(st.integers(-2, 60000), max_size=6) | JSON,
    "max_completion_tokens": SMALL | ODD,
    "n": SMALL | ODD,
    "temperature": st.floats(-1, 3) | ODD,
    "top_p": st.floats(-1, 2) | ODD,
    "top_k": SMALL | ODD,
    "min_p": st.floats(-1, 2) | ODD,
    "seed": st.integers() | ODD,
    "stop": st.text(max_size=4) | st.lists(st.text(max_size=4), max_size=5) | JSON,
    "logit_bias": st.dictionaries(st.integers(-1, 50000).map(str), st.floats(-200, 200), max_size=3) | JSON,
    "logprobs": st.booleans() | SMALL | ODD,
    "top_logprobs": SMALL | ODD,
    "echo": st.booleans() | ODD,
    "stream": st.booleans() | ODD,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans() | ODD}) | JSON,
    "bad_words": st.lists(st.text(max_size=4), max_size=3) | JSON,
    "allowed_token_ids": st.lists(st.integers(-1, 50000), max_size=3) | JSON,
    "stop_token_ids": st.lists(st.integers(-1, 50000), max_size=3) | JSON,
    "repetition_penalty": st.floats(-1, 3) | ODD,
    "add_generation_prompt": st.booleans() | ODD,
    "continue_final_message": st.booleans() | ODD,
    "return_token_strs": st.booleans() | ODD,
    "tools": JSON,
    "model": ODD,
}
# A short answer always, as thousands are asked for.
BODIES = st.fixed_dictionaries({"max_tokens": st.integers(0, 4)}, optional=FIELDS) | JSON
HEADERS = st.dictionaries(
    st.sampled_from(["Authorization", "X-Request-Id", "Content-Type", "Origin", "Accept"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40), max_size=3,
)  # fmt: skip


class _Over(Exception):
    """The time is up."""


def fuzz(server, num_requests: int, until_s: float = float("inf")) -> int:
    count = 0

    @settings(max_examples=num_requests, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(PATHS), BODIES | st.binary(max_size=40), HEADERS)
    def answered(path: str, body: object, headers: dict[str, str]) -> None:
        nonlocal count
        if time.monotonic() > until_s:
            raise _Over
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = server.ask("POST", path, content, **headers)
        count += 1
        assert status < 500, (status, path, content, answer)
        assert status == 200 or set(json.loads(answer)) == {"error"}

    with contextlib.suppress(_Over):
        answered()
    assert server.get("/health")[0] == 200
    server.until("tsqp:num_requests_running", 0)
    server.until("tsqp:num_requests_waiting", 0)
    assert server.metric("tsqp:kv_cache_usage_perc") == 0
    return count


def test_odd_requests_are_answered_by_no_500_and_leave_nothing(server):
    assert fuzz(server, 60) >= 60


@pytest.mark.serving
def test_odd_requests_for_five_minutes(server):
    seconds = float(os.environ.get("TSQP_SHM_FUZZ_S", "300"))
    print(f"{fuzz(server, 10**9, time.monotonic() + seconds)} requests")
