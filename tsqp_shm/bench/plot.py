"""The picture of a run: how long each contender took, and where the time of the split ones went."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tsqp_shm.bench.report import duration
from tsqp_shm.errors import ConfigError
from tsqp_shm.wrapping import wrapped

DPI = 120
LEGEND_SIZE = 9
_WIDTH_INCHES = 12
# What has room, in letters of the sizes used.
_LABEL_CHARACTERS, _SCENE_CHARACTERS, _TITLE_CHARACTERS = 44, 28, 110
# The operations of both sides, as the network has them.
_IN_WORDS = {
    "EMBED": "embedding", "RMSNORM": "norms", "QUANTISE": "to integers", "QKV": "q, k and v",
    "ROPE": "rotary embedding", "SCORES": "q x k", "SOFTMAX": "softmax", "CONTEXT": "p x v, and its output",
    "ATTENTION": "attention", "O": "attention's output", "GATE_UP": "gate and up", "SILU": "SiLU", "DOWN": "down",
    "LM_HEAD": "logits", "CHECK": "checks", "SAMPLE": "sampling", "LOAD": "reading slots", "SERIALISE": "serialising",
}  # fmt: skip


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings, facts, rows = document["settings"], document["environment"], document["rows"]
    split = [row for row in rows if row["operations"]]
    labels = _labels(rows)
    heights = [_height(labels), *([2 * _height(labels[: len(split)])] if split else [])]
    # No pyplot: it would look for a display.
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    per, runs = rows[0]["per"], settings["runs"]
    ours = rows[0]["contender"].partition(" ")[0]
    colours = ["C0" if row["contender"].partition(" ")[0] == ours else "C7" for row in rows]
    draw_bars(panels[0], rows, labels, colours)
    panels[0].set_xlabel(f"ms a {per}: the median of {runs} runs, and from the least to the most")
    if split:
        _draw_operations(panels[1], split, [label for label, row in zip(labels, rows, strict=True) if row in split])
        panels[1].set_xlabel(f"ms a {per}: where the time goes; the line is the whole, with what is between the sides")
        figure.legend(loc="outside lower center", ncols=6, fontsize=LEGEND_SIZE)
    lengths = " and ".join(f"{tokens:,}" for tokens in settings["tokens"])
    title = (
        f"{settings['case']}, {lengths} tokens of prompt; {settings['model']}, {settings['dtype']}, "
        f"{settings['threads']} threads; {facts['cores']} cores of {facts['processor']}"
    )
    figure.suptitle("\n".join(wrapped(title, _TITLE_CHARACTERS)), fontsize=11)
    figure.savefig(file, dpi=DPI)


def _labels(rows: list[dict[str, Any]]) -> list[str]:
    """Of each, with what tells it from the others."""
    batched, lengths = (len({row[name] for row in rows}) > 1 for name in ("sequences", "prompt_tokens"))
    labels = []
    for row in rows:
        more = [f"{row['sequences']} sequences" if row["sequences"] > 1 else "1 sequence"] if batched else []
        more += [f"{row['prompt_tokens']:,} tokens"] if lengths else []
        labels.append("\n".join(wrapped(", ".join([row["contender"], *more]), _LABEL_CHARACTERS)))
    return labels


def _height(labels: list[str]) -> float:
    """Inches, for a bar each and what is around them."""
    return 0.8 + len(labels) * (0.14 + 0.17 * (1 + max(label.count("\n") for label in labels)))


def draw_bars(panel: Any, rows: list[dict[str, Any]], labels: list[str], colours: list[str]) -> None:
    """Medians, each with its number beside it."""
    places = range(len(rows))
    medians = [1e3 * row["median_s"] for row in rows]
    errors = [
        [1e3 * (row["median_s"] - row["min_s"]) for row in rows],
        [1e3 * (row["max_s"] - row["median_s"]) for row in rows],
    ]
    panel.barh(places, medians, xerr=errors, color=colours, capsize=3)
    for place, row in zip(places, rows, strict=True):
        panel.annotate(
            duration(row["median_s"]), (1e3 * row["max_s"], place), (4, 0),
            textcoords="offset points", va="center", fontsize=LEGEND_SIZE, annotation_clip=False,
        )  # fmt: skip
    panel.set_yticks(places, labels, fontsize=LEGEND_SIZE)
    panel.invert_yaxis()
    # The longest has its number beside it too.
    panel.set_xlim(0, 1e3 * max(row["max_s"] for row in rows) * 1.3)


def _draw_operations(panel: Any, rows: list[dict[str, Any]], labels: list[str]) -> None:
    """A side's operations one after another, under the time that the whole took; the sides overlap."""
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    found = {operation["operation"] for row in rows for operation in row["operations"]}
    # In the order of a pass, and with the same colours in every picture.
    names = [name for name in _IN_WORDS if name in found] + sorted(found - _IN_WORDS.keys())
    colours = {name: palette(list(_IN_WORDS).index(name) if name in _IN_WORDS else 19) for name in names}
    for name in names:
        panel.barh(0, 0, color=colours[name], label=_IN_WORDS.get(name, name.lower()))
    ticks: list[str] = []
    for row, label in zip(rows, labels, strict=True):
        for side, title in (("gpu", "GPU process"), ("tee", "TEE process")):
            operations = [operation for operation in row["operations"] if operation["side"] == side]
            if not operations:
                continue
            place, start = len(ticks), 0.0
            ticks.append(f"{label}: {title}")
            for operation in sorted(operations, key=lambda operation: names.index(operation["operation"])):
                width = 1e3 * operation["total_s"]
                panel.barh(
                    place, width, left=start, color=colours[operation["operation"]], edgecolor="white", linewidth=0.5
                )
                start += width
            whole = 1e3 * row["median_s"]
            panel.plot([whole, whole], [place - 0.4, place + 0.4], color="black")
    panel.set_yticks(range(len(ticks)), ticks, fontsize=LEGEND_SIZE)
    panel.invert_yaxis()
    panel.set_xlim(left=0)


def draw_waits(document: dict[str, Any], file: Path) -> None:
    """One panel for each scene: the median and the 99th percentile over the spin threshold, a line for each yield."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, facts = document["rows"], document["environment"]
    scenes = list(dict.fromkeys(row["scene"] for row in rows))
    figure = Figure(figsize=(3.2 * len(scenes), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(scenes), squeeze=False, sharey=True)[0]
    for panel, scene in zip(panels, scenes, strict=True):
        for number, yield_us in enumerate(dict.fromkeys(row["yield_us"] for row in rows)):
            line = [row for row in rows if row["scene"] == scene and row["yield_us"] == yield_us]
            spins = [str(row["spin_us"]) for row in line]
            for name, style, in_words in (("p50_us", "o-", "median"), ("p99_us", "o:", "99th percentile")):
                panel.plot(
                    spins, [row[name] for row in line], f"C{number}{style}", markersize=4,
                    label=f"yields for {yield_us:,} us: {in_words}" if panel is panels[0] else None,
                )  # fmt: skip
        panel.set_yscale("log")
        panel.set_xlabel("spins for so many us before")
        panel.set_title("\n".join(wrapped(scene, _SCENE_CHARACTERS)), fontsize=10)
    panels[0].set_ylabel("us beside the peer's work")
    # Each threshold's two below each other.
    num_lines = len(panels[0].get_lines())
    figure.legend(loc="outside lower center", ncols=num_lines // 2, fontsize=LEGEND_SIZE)
    figure.suptitle(f"a doorbell's round trip; {facts['cores']} cores of {facts['processor']}", fontsize=11)
    figure.savefig(file, dpi=DPI)
