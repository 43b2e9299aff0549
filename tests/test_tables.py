"""Every table of the benchmarks is at most 100 columns wide, with whatever names, sizes and numbers, and says all."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_documents import FACTS, KERNEL, LAUNCHED, MODEL, NAMES, of_latency, of_modes, of_quality, of_waits, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp_shm.bench import first_token, idle, kernels, report
from tsqp_shm.bench.latency import run as latency
from tsqp_shm.bench.latency import waits
from tsqp_shm.bench.modes import table as modes
from tsqp_shm.bench.quality import table as quality
from tsqp_shm.bench.serve import table as serve
from tsqp_shm.bench.serve.asked import Asked
from tsqp_shm.bench.serve.load import Loaded
from tsqp_shm.bench.serve.rows import Case, Round, make_rows
from tsqp_shm.bench.tables import WIDTH, print_columns, say
from tsqp_shm.modes import MODES

SCRIPTS = Path(__file__).parents[1] / "scripts"


def width(text: str) -> int:
    return max(map(len, text.splitlines()))


def printed(print_document: Any, document: dict[str, Any]) -> str:
    out = io.StringIO()
    print_document(document, out)
    return out.getvalue()


def of_serve() -> dict[str, Any]:
    answers = [Asked("", 1 << 20, 1 << 20, 86_400.0, (86_400.0, 1e-6)), Asked("a reason of many words " * 9)]
    rounds = [Round(Loaded(1e-3, 1e-3, tuple(answers)), 99_999.0, 1 << 43)]
    cases = [Case(clients, temperature) for clients in (1, 1024) for temperature in (0.0, 0.123456)]
    rows = make_rows({case: dict.fromkeys(NAMES, rounds) for case in cases}, dict.fromkeys(NAMES))
    numbers = dict.fromkeys(("tokens", "new_tokens", "requests", "threads", "sequences", "runs"), 1 << 20)
    return {"environment": FACTS, "settings": {"model": MODEL, "dtype": "bfloat16", **numbers}, "rows": rows}


DOCUMENTS = {
    "serve": (serve.print_tables, of_serve()),
    "prefill": (report.print_table, whole()),
    "modes": (modes.print_tables, of_modes()),
    "quality": (quality.print_table, of_quality()),
    "latency": (latency.print_tables, of_latency()),
    "waits": (waits.print_table, of_waits()),
    "launch": (first_token.print_table, {
        "environment": FACTS, "model": MODEL, "dtype": "bfloat16",
        "rows": [{"contender": name, "runs": 1_000_000, **LAUNCHED} for name in NAMES],
    }),
    "idle": (idle.print_table, {
        "environment": FACTS, "model": MODEL, "dtype": "bfloat16", "seconds": 3600.0,
        "core_share": {mode: {"tee": 512.0, "gpu": 512.0} for mode in MODES},
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
