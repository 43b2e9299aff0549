"""The picture of a run: how long each contender took, and where the time of the split ones went."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tsqp_shm.errors import ConfigError


def require_plot(file: Path) -> None:
    """Before anything is measured.

    Raises:
        ConfigError: it is not a PNG file, or matplotlib is not installed.
    """
    if file.suffix != ".png":
        raise ConfigError("plot", str(file), "a name that ends in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot", str(file), "matplotlib to be installed: pip install matplotlib")


def draw(document: dict[str, Any], file: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings, facts, rows = document["settings"], document["environment"], document["rows"]
    split = [row for row in rows if row["operations"]]
    per = rows[0]["per"]
    batched, lengths = (len({row[name] for row in rows}) > 1 for name in ("sequences", "prompt_tokens"))
    # No pyplot: it would look for a display.
    figure = Figure(figsize=(13, 3.2 + 0.35 * (len(rows) + 2 * len(split))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))

    def label(row: dict[str, Any]) -> str:
        times = f" x{row['sequences']}" if batched else ""
        return f"{row['contender']}{times}" + (f" {row['prompt_tokens']:,}" if lengths else "")

    places = list(range(len(rows)))
    medians = [1e3 * row["median_s"] for row in rows]
    errors = [
        [1e3 * (row["median_s"] - row["min_s"]) for row in rows],
        [1e3 * (row["max_s"] - row["median_s"]) for row in rows],
    ]
    ours = rows[0]["contender"].partition(" ")[0]
    colours = ["C0" if row["contender"].partition(" ")[0] == ours else "C7" for row in rows]
    left.barh(places, medians, xerr=errors, color=colours, capsize=3)
    for place, value, row in zip(places, medians, rows, strict=True):
        left.annotate(
            f"{value:,.1f} ms", (1e3 * row["max_s"], place), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    left.set_yticks(places, [label(row) for row in rows])
    left.invert_yaxis()
    left.margins(x=0.25)
    left.set_xlabel(f"ms a {per}: median, least and most of {settings['runs']} runs")
    left.set_title("comparison", fontsize=10)

    # A side's operations one after another, under the time that the whole took; the sides overlap.
    palette = colormaps["tab20"]
    names: dict[str, Any] = {}
    ticks: list[str] = []
    for row in split:
        for side in ("gpu", "tee"):
            place, start = len(ticks), 0.0
            ticks.append(f"{label(row)}: {side}")
            operations = [operation for operation in row["operations"] if operation["side"] == side]
            for operation in sorted(operations, key=lambda operation: -operation["total_s"]):
                name = operation["operation"]
                colour = names.get(name) or palette(len(names) % 20)
                width = 1e3 * operation["total_s"]
                right.barh(
                    place, width, left=start, color=colour, label=None if name in names else name, edgecolor="white"
                )
                names[name] = colour
                start += width
            whole = 1e3 * row["median_s"]
            right.plot([whole, whole], [place - 0.4, place + 0.4], color="black")
    right.set_yticks(range(len(ticks)), ticks)
    right.invert_yaxis()
    right.set_xlabel(f"ms a {per}; the black line is the whole, both sides and what is between them")
    right.set_title("where the time goes", fontsize=10)
    right.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(
        f"{settings['case']}, {', '.join(map(str, settings['tokens']))} tokens, {settings['model']}, "
        f"{settings['dtype']}, "
        f"{settings['threads']} threads; {facts['cores']} cores of {facts['processor']}",
        fontsize=10,
    )
    figure.savefig(file, dpi=120)


def draw_waits(document: dict[str, Any], file: Path) -> None:
    """One panel for each scene: the median and the 99th percentile over the spin threshold, a line for each yield."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, facts = document["rows"], document["environment"]
    scenes = list(dict.fromkeys(row["scene"] for row in rows))
    figure = Figure(figsize=(3.4 * len(scenes), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, scene in zip(figure.subplots(1, len(scenes), squeeze=False, sharey=True)[0], scenes, strict=True):
        for number, yield_us in enumerate(dict.fromkeys(row["yield_us"] for row in rows)):
            line = [row for row in rows if row["scene"] == scene and row["yield_us"] == yield_us]
            spins = [str(row["spin_us"]) for row in line]
            panel.plot(spins, [row["p50_us"] for row in line], f"C{number}o-", label=f"yield {yield_us} us")
            panel.plot(spins, [row["p99_us"] for row in line], f"C{number}:")
        panel.set_yscale("log")
        panel.set_xlabel("spin, us")
        panel.set_title(scene, fontsize=8)
    figure.axes[0].set_ylabel("us beside the peer's work; solid p50, dotted p99")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"a doorbell round trip; {facts['cores']} cores of {facts['processor']}", fontsize=10)
    figure.savefig(file, dpi=120)
