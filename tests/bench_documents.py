"""Documents of benchmarks with the longest names and the largest numbers that they may have, and no run behind them."""

from __future__ import annotations

from typing import Any

from tsqp_shm.bench import report
from tsqp_shm.bench.cases import Turn
from tsqp_shm.bench.latency.waits import SCENES
from tsqp_shm.modes import MODES

NAMES = [
    *(
        f"tsqp-shm-{mode} tile-rows=1048576 tiles-in-flight=64 max-batch-tokens=1048576 gpu-threads=1024"
        for mode in MODES
    ),
    *("tsqp-shm-blinded stocked", "transformers-sdpa", "transformers-eager", "serialized"),
    "a-contender-whose-name-is-one-word-and-much-longer-than-anything-that-this-system-has-ever-measured-beside-it",
]
FACTS = {
    "processor": "A Processor With A Name As Long As Those Of Some Vendors (R) Gold Platinum 9999X v42 @ 5.00GHz",
    "cores": 512,
    "virtual": True,
    "load_1m": 1234.56,
    "python": "3.14.0rc1+local",
    "kernel": "6.18.44",
    "torch": "2.13.0+cu130.with.a.local.label",
    "transformers": "5.23.0.dev0",
    "commit": "f" * 40 + "+changes",
    "threads": 512,
    "libzmq": "4.3.5",
    "spin_us": 10_000_000,
    "yield_us": 10_000_000,
}
MODEL = "a-folder-with-a-name-of-one-word-" * 6
OPERATIONS = [
    {"side": side, "operation": name, "calls": 1 << 20, "total_s": 9_999.0}
    for side in ("gpu", "tee")
    for name in ("EMBED", "RMSNORM", "QKV", "ROPE", "SOFTMAX", "GATE_UP", "DOWN", "LM_HEAD", "SERIALISE", "ANOTHER")
]
PERCENTILES = {name: 123_456_789.123 for name in ("p50_us", "p90_us", "p99_us", "max_us")}


def answer(seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tokens": 1 << 20,
        "cpu_s": 99_999.0,
        "peak_bytes": {"tee": 1 << 43, "gpu": 1 << 43},
        "bytes_to_gpu": 1 << 50,
        "bytes_to_tee": 1 << 50,
        "doorbells": 1 << 40,
        "operations": OPERATIONS,
    }


def whole() -> dict[str, Any]:
    turns = [Turn("prefill", count, tokens) for count, tokens in ((1, 512), (1, 1 << 20), (8, 1 << 20))]
    answers = {(name, turn): [answer(86_400.0 + tenths) for tenths in (1, 9_000)] for name in NAMES for turn in turns}
    settings = {
        "case": "prefill",
        "tokens": [512, 1 << 20],
        "model": MODEL,
        "dtype": "bfloat16",
        "threads": 1024,
        "runs": 9,
    }
    return {"environment": FACTS, "settings": settings, "rows": report.make_rows(answers, {512: 1, 1 << 20: 1 << 50})}


def of_modes() -> dict[str, Any]:
    rows = whole()["rows"]
    for row in rows:
        row.update(
            label=row["contender"], device="cuda:0 (a long name of a device)", cpu_s_per_token_with_pads=12_345.6
        )
        row.update(mode=row["mode"] or "plain", pads_per_s=1e12, pads={"made": 1e12})
    rows[0]["label"] = "blinded stocked"
    seconds = {"tee_only": 1e5, "verified": 1e-5, "stocked": 1e5, "sustained": 1e-5}
    forecast = [{"model": MODEL, "rows": 1 << 20, "context": context, "seconds": seconds} for context in (0, 512)]
    machine = {"name": "yours", "in_words": "an assumption, " * 20, "rows": forecast}
    costs = ("digit_macs_per_s", "pad_macs_per_s", "check_ns", "lone_check_ns", "pad_ns", "attention_flops_per_s")
    here = ("memory_bytes_per_s", "gpu_bytes_per_s", "gpu_macs_per_s", "round_trip_s")
    beside = [{"case": "prefill", "label": name, "forecast_s": 1e5, "measured_s": 1e-5} for name in NAMES]
    stock = {"stocked": 1 << 30, "sustained": 1 << 30}
    return {
        "environment": FACTS,
        "settings": {"model": MODEL, "threads": 512, "pad_threads": 512, "runs": 1_000_000, "pad_stock": stock},
        "rows": rows,
        "outlook": {
            "costs": dict.fromkeys(costs, 1e15),
            "here": dict.fromkeys(here, 1e18),
            "beside_measured": beside,
            "machines": [machine],
        },
    }


def of_quality() -> dict[str, Any]:
    scores = {"perplexity": 123_456_789.0, "top1": 0.5, "largest": 1e-300, "kl": 1e-300, "predictions": 1e9}
    agreement = {"answers": 10**9, "whole": 10**9, "ids": 16.0, "of": 16.0}
    said = "an answer of many words " * 9
    columns = [{"column": name, "scores": [scores], "agreement": agreement, "answers": [said + name]} for name in NAMES]
    return {
        "environment": FACTS,
        "settings": {"model": MODEL},
        "texts": ["a text " * 30],
        "columns": columns,
        "questions": ["a question " * 30],
    }


def of_latency() -> dict[str, Any]:
    row = {"case": "doorbell-parked", "mode": "adaptive", "payload_bytes": 64 << 40, "n": 1_000_000, **PERCENTILES}
    copy = {
        "direction": "arena to device",
        "way": "registered",
        "gb_per_s": 1e9,
        "share_of_bus": 99.0,
        "bytes": 64 << 20,
    }
    return {
        "environment": FACTS,
        "rows": [row],
        "ratios": {"a ratio " * 20: 1.0},
        "copies": {"reason": "", "rows": [copy], "refused": {"staged": "a reason " * 20}},
    }


def of_waits() -> dict[str, Any]:
    pairs = [(spin_us, yield_us) for spin_us in (0, 20, 10_000_000) for yield_us in (0, 10_000_000)]
    rows = [
        {"scene": scene.name, "spin_us": spin_us, "yield_us": yield_us, "n": 1_000_000, **PERCENTILES}
        for scene in SCENES
        for spin_us, yield_us in pairs
    ]
    return {"environment": FACTS, "rows": rows}


LAUNCHED: dict[str, Any] = {"mode": None} | {name: 86_400.0 for name in ("median_s", "min_s", "max_s", "ours_over_it")}
KERNEL = {"kernel": "softmax_causal", "shape": "[1048576, 28672]", "us": 1e9, "gb_per_s": 1e5, "share_of_copy": 99.0}
