"""The picture of a run: tokens a second, times to the first text and between texts, by clients; a row for each way to
draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsqp_shm.bench.serve.rows import drawn


def draw(document: dict[str, Any], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings, facts, rows = document["settings"], document["environment"], document["rows"]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    clients = list(dict.fromkeys(row["clients"] for row in rows))
    # No pyplot: it would look for a display.
    figure = Figure(figsize=(13, 1.2 + 3.2 * len(temperatures)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(temperatures), 3, squeeze=False)
    width = 0.8 / len(names)
    for line, temperature in zip(panels, temperatures, strict=True):
        found = {(row["contender"], row["clients"]): row for row in rows if row["temperature"] == temperature}
        for number, name in enumerate(names):
            its = [found[name, count] for count in clients]
            places = [place + width * (number - (len(names) - 1) / 2) for place in range(len(clients))]
            speeds = [row["tokens_per_s"] or 0 for row in its]
            reach = [[value for value in row["samples"]["tokens_per_s"] if value] or [0] for row in its]
            errors = [
                [max(0, speed - min(values)) for speed, values in zip(speeds, reach, strict=True)],
                [max(0, max(values) - speed) for speed, values in zip(speeds, reach, strict=True)],
            ]
            colour = f"C{number}"
            line[0].bar(places, speeds, width, yerr=errors, color=colour, label=name, capsize=2)
            for panel, measure in ((line[1], "first"), (line[2], "gap")):
                middle, high = ([1e3 * (row[f"{measure}_{q}_s"] or 0) for row in its] for q in ("p50", "p99"))
                panel.bar(places, middle, width, color=colour)
                panel.plot(places, high, "_", color=colour, markersize=10)
        for panel, title in zip(
            line, ("tokens/s", "ms to the first text: bar p50, dash p99", "ms between texts, the same"), strict=True
        ):
            panel.set_xticks(range(len(clients)), [f"{count}" for count in clients])
            panel.set_title(f"{drawn(temperature)}: {title}", fontsize=9)
            panel.set_xlabel("clients", fontsize=8)
        for panel in line[1:]:
            panel.set_yscale("log")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8)
    figure.suptitle(
        f"servers of {settings['model']}, {settings['dtype']}, {settings['tokens']} + {settings['new_tokens']} tokens, "
        f"{settings['threads']} threads; {facts['cores']} cores of {facts['processor']}",
        fontsize=10,
    )
    figure.savefig(file, dpi=120)
