"""The picture of `tsqp-shm bench modes`: what was measured above, what is forecast for other machines below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsqp_shm.bench.modes.outlook import LABELS
from tsqp_shm.bench.report import duration

_COLOURS = {"plain": "C7", "verified": "C0", "blinded stocked": "C2", "blinded sustained": "C1", "tee-only": "C3"}
_FORECAST = {
    "tee_only": "tee-only",
    "verified": "verified",
    "stocked": "blinded stocked",
    "sustained": "blinded sustained",
}
_TITLES = {
    "prefill": "a prompt of {0:,} tokens",
    "decode": "a token at context {0:,}",
    "batch": "a token, 8 sequences",
}


def draw(document: dict[str, Any], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, facts, outlook = document["rows"], document["environment"], document["outlook"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    machines = outlook["machines"] if outlook else []
    # No pyplot: it would look for a display.
    figure = Figure(figsize=(13, 3.4 + 3.4 * bool(machines)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(1 + bool(machines), 1, squeeze=False)[:, 0]
    parts[0].suptitle(
        f"measured: {document['settings']['model']}, {facts['cores']} cores of {facts['processor']}", fontsize=10
    )
    for panel, case in zip(parts[0].subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        _draw_case(panel, [row for row in rows if row["case"] == case])
    if machines:
        parts[1].suptitle("forecast, not measured: tokens/s at context 512 (lines 1, 8, 64 sequences)", fontsize=10)
        for panel, machine in zip(parts[1].subplots(1, len(machines), squeeze=False)[0], machines, strict=True):
            _draw_machine(panel, machine)
        parts[1].axes[0].set_ylabel("tokens/s")
        parts[1].axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=120)


def _draw_case(panel: Any, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    medians = [1e3 * row["median_s"] for row in rows]
    errors = [
        [1e3 * (row["median_s"] - row["min_s"]) for row in rows],
        [1e3 * (row["max_s"] - row["median_s"]) for row in rows],
    ]
    panel.barh(places, medians, xerr=errors, color=[_COLOURS[row["label"]] for row in rows], capsize=3)
    for place, row in zip(places, rows, strict=True):
        panel.annotate(
            duration(row["median_s"]), (1e3 * row["max_s"], place), (4, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    panel.set_yticks(places, [row["label"] for row in rows])
    panel.invert_yaxis()
    panel.margins(x=0.25)
    panel.set_xlabel("ms: median, least and most")
    panel.set_title(_TITLES[rows[0]["case"]].format(rows[0]["prompt_tokens"]), fontsize=9)


def _draw_machine(panel: Any, machine: dict[str, Any]) -> None:
    """Groups of bars, a model each; of one mode the bars of 1, 8 and 64 sequences lie one in front of the other."""
    rows = [row for row in machine["rows"] if row["context"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, (field, label) in enumerate(LABELS.items()):
        for row in rows:
            seconds = row["seconds"][field]
            if seconds is None:
                continue
            place = models.index(row["model"]) + (number - 1.5) * 0.2
            speed = row["rows"] / seconds
            is_first = row is rows[0]
            panel.plot(
                [place - 0.08, place + 0.08], [speed, speed], color=_COLOURS[label], linewidth=2.5,
                label=label if is_first else None,
            )  # fmt: skip
    panel.set_yscale("log")
    panel.set_xticks(range(len(models)), models, fontsize=8)
    memory = f"{machine['memory_bytes_per_s'] / 1e9:.0f} GB/s"
    panel.set_title(f"{machine['name']}: {machine['cores']} cores, {memory}, {machine['gpu']}", fontsize=9)
