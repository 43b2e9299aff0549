"""What a run of `tsqp-shm bench modes` found: a row for each case and contender."""

from __future__ import annotations

import statistics
from typing import Any

from tsqp_shm.bench import report
from tsqp_shm.bench.cases import Turn
from tsqp_shm.bench.contenders import RunningContender
from tsqp_shm.bench.report import Answers, Row


def make_rows(answers: Answers, running: list[RunningContender], num_linears: int) -> list[Row]:
    """As `report.make_rows`, and of pads and round trips what there is.

    Units: `pads_per_s` is of one row of one Linear each: made where a stock was filled, else used.
    `cpu_s_per_token_with_pads` has what the pads took that were made before.
    """
    rows = report.make_rows(answers)
    devices = {contender.name: contender.device for contender in running}
    for row, ((name, turn), given) in zip(rows, answers.items(), strict=True):
        row["label"] = " ".join([row["mode"], *name.split(" ")[1:]])
        row["device"] = devices[name]
        row["round_trip_us"] = _median([answer["round_trip_us"] for answer in given if answer["round_trip_us"]])
        row.update(_of_pads(row, turn, given, num_linears) if "pads" in given[0] else _NO_PADS)
    return rows


_NO_PADS: Row = {"pads": None, "pads_per_s": None, "cpu_s_per_token_with_pads": None}


def _of_pads(row: Row, turn: Turn, answers: list[dict[str, Any]], num_linears: int) -> Row:
    counts = [answer["pads"] for answer in answers]
    names = ("made", "used", "burned", "tee_products")
    found: Row = {"pads": {name: sum(count[name] for count in counts) / len(counts) for name in names}}
    filled = [count["filling"] for count in counts if count["filling"] and count["filling"]["pads"]]
    if not filled:
        # Of a prompt lm_head has a row.
        of_prompt = turn.tokens * (num_linears - 1) + 1
        found["pads_per_s"] = (num_linears if turn.new_tokens else of_prompt) / row["median_s"]
        found["cpu_s_per_token_with_pads"] = row["cpu_s_per_token"]
        return found
    pads = sum(each["pads"] for each in filled)
    found["pads_per_s"] = pads / sum(each["seconds"] for each in filled)
    of_row = sum(each["cpu_s"] for each in filled) / pads * num_linears
    found["cpu_s_per_token_with_pads"] = row["cpu_s_per_token"] + of_row
    return found


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
