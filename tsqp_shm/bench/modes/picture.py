"""The picture of `tsqp-shm bench modes`: what was measured above, what is forecast for other machines below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsqp_shm.bench.modes.outlook import LABELS
from tsqp_shm.bench.plot import DPI, LEGEND_SIZE, draw_bars

_COLOURS = {"plain": "C7", "verified": "C0", "blinded stocked": "C2", "blinded sustained": "C1", "tee-only": "C3"}
_TITLES = {
    "prefill": "a prompt of {0:,} tokens",
    "decode": "a token at context {0:,}",
    "batch": "a token of {1} sequences, at context {0:,}",
}


def draw(document: dict[str, Any], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, facts, outlook = document["rows"], document["environment"], document["outlook"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    machines = outlook["machines"] if outlook else []
    # No pyplot: it would look for a display.
    figure = Figure(figsize=(13, 3.2 + 4.0 * bool(machines)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(1 + bool(machines), 1, squeeze=False, height_ratios=[3.2, 4.0][: 1 + bool(machines)])[
        :, 0
    ]
    parts[0].suptitle(
        f"measured: {document['settings']['model']}, {facts['cores']} cores of {facts['processor']}", fontsize=11
    )
    for number, panel in enumerate(parts[0].subplots(1, len(cases), squeeze=False)[0]):
        _draw_case(panel, [row for row in rows if row["case"] == cases[number]], is_named=number == 0)
    if machines:
        parts[1].suptitle(
            "forecast, not measured: tokens/s at context 512; of each colour, from below, 1, 8 and 64 sequences",
            fontsize=11,
        )
        panels = parts[1].subplots(1, len(machines), squeeze=False, sharey=True)[0]
        for panel, machine in zip(panels, machines, strict=True):
            _draw_machine(panel, machine)
        panels[0].set_ylabel("tokens/s")
        handles, labels = panels[0].get_legend_handles_labels()
        parts[1].legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=LEGEND_SIZE)
    figure.savefig(file, dpi=DPI)


def _draw_case(panel: Any, rows: list[dict[str, Any]], *, is_named: bool) -> None:
    labels = [row["label"] if is_named else "" for row in rows]
    draw_bars(panel, rows, labels, [_COLOURS[row["label"]] for row in rows])
    panel.set_xlabel("ms: the median, and from the least to the most")
    panel.set_title(_TITLES[rows[0]["case"]].format(rows[0]["prompt_tokens"], rows[0]["sequences"]), fontsize=10)


def _draw_machine(panel: Any, machine: dict[str, Any]) -> None:
    """Groups of lines, a model each; of one mode those of 1, 8 and 64 sequences lie one above the other."""
    rows = [row for row in machine["rows"] if row["context"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, (field, label) in enumerate(LABELS.items()):
        panel.plot([], [], color=_COLOURS[label], linewidth=2.5, label=label)
        for row in rows:
            seconds = row["seconds"][field]
            if seconds is None:
                continue
            place = models.index(row["model"]) + (number - 1.5) * 0.2
            speed = row["rows"] / seconds
            panel.plot([place - 0.08, place + 0.08], [speed, speed], color=_COLOURS[label], linewidth=2.5)
    panel.set_yscale("log")
    # All models have their place, those too that do not fit this machine.
    panel.set_xlim(-0.5, len(models) - 0.5)
    panel.set_xticks(range(len(models)), models, fontsize=LEGEND_SIZE)
    memory = f"{machine['memory_bytes_per_s'] / 1e9:.0f} GB/s"
    panel.set_title(f"{machine['name']}: {machine['cores']} cores, {memory}, {machine['gpu']}", fontsize=10)
