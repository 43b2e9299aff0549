"""Every table of the benchmarks is at most 100 columns wide, with whatever names, sizes and numbers, and says all."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp_shm.bench import first_token, idle, kernels, report
from tsqp_shm.bench.cases import Turn
from tsqp_shm.bench.latency import run as latency
from tsqp_shm.bench.latency import waits
from tsqp_shm.bench.modes import table as modes
from tsqp_shm.bench.quality import table as quality
from tsqp_shm.bench.tables import WIDTH, print_columns, say
from tsqp_shm.modes import MODES

SCRIPTS = Path(__file__).parents[1] / "scripts"
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
PERCENTILES = {name: 123_456_789.123 for name in ("p50_us", "p90_us", "p99_us", "max_us")}


def width(text: str) -> int:
    return max(map(len, text.splitlines()))


def printed(print_document: Any, document: dict[str, Any]) -> str:
    out = io.StringIO()
    print_document(document, out)
    return out.getvalue()


def answer(seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tokens": 1 << 20,
        "cpu_s": 99_999.0,
        "peak_bytes": {"tee": 1 << 43, "gpu": 1 << 43},
        "bytes_to_gpu": 1 << 50,
        "bytes_to_tee": 1 << 50,
        "doorbells": 1 << 40,
        "operations": [],
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


LAUNCHED = {name: 86_400.0 for name in ("median_s", "min_s", "max_s", "ours_over_it")}
KERNEL = {"kernel": "softmax_causal", "shape": "[1048576, 28672]", "us": 1e9, "gb_per_s": 1e5, "share_of_copy": 99.0}
DOCUMENTS = {
    "prefill": (report.print_table, whole()),
    "modes": (modes.print_tables, of_modes()),
    "quality": (quality.print_table, of_quality()),
    "latency": (latency.print_tables, of_latency()),
    "waits": (waits.print_table, {
        "environment": FACTS,
        "rows": [{"scene": scene.name * 2, "spin_us": 10**7, "yield_us": 10**7, "n": 10**6, **PERCENTILES}
                 for scene in waits.SCENES],
    }),
    "launch": (first_token.print_table, {
        "environment": FACTS, "model": MODEL, "dtype": "bfloat16",
        "rows": [{"contender": name, "runs": 1_000_000, **LAUNCHED} for name in NAMES],
    }),
    "idle": (idle.print_table, {
        "environment": FACTS, "model": MODEL, "dtype": "bfloat16", "seconds": 3600.0,
        "core_share": {name: {"tee": 512.0, "gpu": 512.0} for name in NAMES},
    }),
    "kernels": (kernels.print_table, {
        "environment": FACTS,
        "rows": [{**KERNEL, "model": MODEL, "contender": name, "over_torch": 1e4} for name in NAMES],
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", DOCUMENTS)
def test_the_tables_of_a_case_fit_whatever_its_contenders_are_called(case):
    print_document, document = DOCUMENTS[case]
    said = printed(print_document, document)
    assert width(said) <= WIDTH == 100


SHAPE = "28672x28672"
SCRIPT_TABLES = {
    "bench_checks": ("print_table", lambda time: [("a title", {SHAPE: {f"{n:,} rows": time for n in range(40)}})]),
    "bench_field": ("print_table", lambda _: [("a title", {SHAPE: {f"{n} rows, {n} digits": 1e6 for n in range(40)}})]),
    "bench_pads": ("print_table", lambda _: [("a title", {SHAPE: {f"unmask, from {n}": 1e6 for n in range(40)}})]),
    "bench_attention": ("print_decode", lambda _: [([{
        "shape": MODEL, "sequences": 8, "context": 1 << 20, "cache_bytes": 1 << 50, "attend_us": 1e9, "read_us": 1e9,
        "read_gb_per_s": 1e9, "share_of_read": 1e3, "fastest_share": 1e3,
    }],)]),
    "turns": ("print_rows", lambda _: [({name: [1e9, 1e10] for name in NAMES}, "tokens/s", None)]),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPT_TABLES)
def test_the_tables_of_a_script_fit_too(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    print_table, calls = SCRIPT_TABLES[script]
    program = runpy.run_path(str(SCRIPTS / f"{script}.py"))
    time = program["Times"](123.456, 123.456) if "Times" in program else None
    for arguments in calls(time):
        program[print_table](*arguments)
    assert width(capsys.readouterr().out) <= WIDTH


CELLS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), max_size=130)


@settings(max_examples=50)
@given(st.data())
def test_a_table_has_every_cell_and_is_no_wider(data):
    columns, names = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 4))
    row = st.lists(CELLS, min_size=columns, max_size=columns)
    titles, rows = data.draw(row), data.draw(st.lists(row, max_size=3))
    out = io.StringIO()
    print_columns(titles, rows, out, names=min(names, columns))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines), default=0) <= WIDTH
    for cell in [cell for line in (titles, *rows) for cell in line]:
        # Broken within, it is there in pieces.
        assert all(letter in out.getvalue() for letter in cell if not letter.isspace())


def test_what_fits_is_one_table_and_what_does_not_goes_on_below_under_the_same_names():
    out = io.StringIO()
    print_columns(["name", "first", "second"], [["one", "1", "22"], ["two", "333", "-"]], out)
    assert out.getvalue() == "name  first  second\none       1      22\ntwo     333       -\n"
    out = io.StringIO()
    print_columns(["name", *(f"column number {n}" for n in range(24))], [["one", *map(str, range(100, 124))]], out)
    first, second, *others = out.getvalue().split("\n\n")
    assert not others
    for part in (first, second):
        *_, titles, values = part.splitlines()
        assert titles.split()[0] == "name"
        assert values.split()[0] == "one"
    assert values.split()[-1] == "123"


def test_wide_characters_take_two_columns():
    out = io.StringIO()
    say("信頼" * 60, out)
    assert [len(line) for line in out.getvalue().splitlines()] == [50, 50, 20]
