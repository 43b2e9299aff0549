"""From answers to rows: of each round its own numbers, and of these the median over the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsqp_shm.bench.serve.load import Loaded

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """So many clients at once, at one temperature."""

    clients: int
    temperature: float

    def __str__(self) -> str:
        return f"{self.clients} clients {drawn(self.temperature)}"


@dataclass(frozen=True)
class Round:
    """One turn of one server.

    Attributes:
        cpu_s: of all its processes.
        peak_bytes: of these, so far.
    """

    loaded: Loaded
    cpu_s: float
    peak_bytes: int


def drawn(temperature: float) -> str:
    """How tokens are drawn, in words."""
    return f"at {temperature:g}" if temperature else "greedy"


def make_rows(rounds: Mapping[Case, Mapping[str, Sequence[Round]]], modes: Mapping[str, str | None]) -> list[Row]:
    """One for each case and server.

    Units: seconds.
    """
    return [row for case, of_case in rounds.items() for row in _rows_of(case, of_case, modes)]


def _rows_of(case: Case, of_case: Mapping[str, Sequence[Round]], modes: Mapping[str, str | None]) -> list[Row]:
    rows = [_row(case, name, turns) | {"mode": modes[name]} for name, turns in of_case.items()]
    best = max(rows, key=lambda row: float(row["tokens_per_s"] or 0))
    earliest = min(rows, key=lambda row: float(row["first_p50_s"] or float("inf")))
    for row in rows:
        row["over_best"] = _ratio(row["samples"]["tokens_per_s"], best["samples"]["tokens_per_s"])
        row["first_over_best"] = _ratio(row["samples"]["first_p50_s"], earliest["samples"]["first_p50_s"])
    return rows


def _row(case: Case, name: str, turns: Sequence[Round]) -> Row:
    answers = [answer for turn in turns for answer in turn.loaded.answers]
    whole = [answer for answer in answers if not answer.failure]
    samples = {key: [number(turn.loaded) for turn in turns] for key, number in _NUMBERS.items()}
    made = sum(answer.tokens for answer in whole)
    return {
        "contender": name,
        "clients": case.clients,
        "temperature": case.temperature,
        "requests": len(answers),
        "failed": len(answers) - len(whole),
        "failures": sorted({answer.failure for answer in answers if answer.failure})[:8],
        **{key: _median(values) for key, values in samples.items()},
        "spread": _spread(samples["tokens_per_s"]),
        "gap_max_s": max((gap for answer in whole for gap in answer.gaps_s), default=None),
        "samples": samples,
        "prompt_tokens": statistics.mean(answer.prompt_tokens for answer in whole) if whole else None,
        "tokens": statistics.mean(answer.tokens for answer in whole) if whole else None,
        "cpu_s_per_token": sum(turn.cpu_s for turn in turns) / made if made else None,
        "generator_share": max(turn.loaded.cpu_s / turn.loaded.seconds for turn in turns),
        "peak_bytes": max(turn.peak_bytes for turn in turns),
    }


def _tokens_per_s(loaded: Loaded) -> float | None:
    made = sum(answer.tokens for answer in loaded.answers if not answer.failure)
    return made / loaded.seconds if made else None


def _first(share: float) -> Callable[[Loaded], float | None]:
    return lambda loaded: _quantile([each.first_s for each in loaded.answers if not each.failure], share)


def _gap(share: float) -> Callable[[Loaded], float | None]:
    return lambda loaded: _quantile([gap for each in loaded.answers for gap in each.gaps_s], share)


_NUMBERS: dict[str, Callable[[Loaded], float | None]] = {
    "tokens_per_s": _tokens_per_s,
    "first_p50_s": _first(0.5),
    "first_p99_s": _first(0.99),
    "gap_p50_s": _gap(0.5),
    "gap_p99_s": _gap(0.99),
}


def _quantile(values: list[float], share: float) -> float | None:
    """The least of them that is no less than this share of them; of few, the 99th percentile is the largest."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)] if values else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _spread(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return (max(known) - min(known)) / statistics.median(known) if known else None


def _ratio(values: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """The median of the rounds' own."""
    return _median([one / other for one, other in zip(values, others, strict=True) if one and other])
