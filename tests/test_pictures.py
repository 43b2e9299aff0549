"""The pictures of the benchmarks: what a legend says is in words, beside the data and not on it, and large enough."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_documents import of_modes, of_waits, whole

from tsqp_shm.bench.modes import picture
from tsqp_shm.bench.plot import draw, draw_waits

matplotlib = pytest.importorskip("matplotlib")
LABELS = ("plain", "verified", "blinded stocked", "blinded sustained", "tee-only")


def labelled() -> dict[str, Any]:
    document = of_modes()
    document["rows"] = [
        {**row, "label": label, "case": case, "prompt_tokens": 1 << 20}
        for case in ("prefill", "decode", "batch")
        for label, row in zip(LABELS, document["rows"], strict=False)
    ]
    for row in document["outlook"]["machines"][0]["rows"]:
        row["model"] = "llama-3.1-70b"
    machine = {"cores": 512, "memory_bytes_per_s": 1e12, "gpu": "a GPU with a long name"}
    document["outlook"]["machines"] = [{**document["outlook"]["machines"][0], **machine} for _ in range(4)]
    return document


def drawn(draw_document: Callable[[dict[str, Any], Path], None], document: dict[str, Any], path: Path, patch) -> Any:
    """The figure that was saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **settings: Any) -> None:
        save(figure, *arguments, **settings)
        figures.append(figure)

    patch.setattr(Figure, "savefig", savefig)
    draw_document(document, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    return figure


@pytest.mark.long
@pytest.mark.parametrize(
    ("draw_document", "document"),
    [(draw, whole()), (draw_waits, of_waits()), (picture.draw, labelled())],
    ids=["prefill", "waits", "modes"],
)
def test_a_legend_is_beside_the_panels_in_words_and_within_the_picture(draw_document, document, tmp_path, monkeypatch):
    figure = drawn(draw_document, document, tmp_path / "picture.png", monkeypatch)
    legends = [legend for part in (figure, *figure.subfigs) for legend in part.legends]
    assert legends
    for legend in legends:
        place = legend.get_window_extent()
        assert figure.bbox.width >= place.x1 > place.x0 >= 0
        assert figure.bbox.height >= place.y1 > place.y0 >= 0
        assert not any(place.overlaps(panel.get_tightbbox()) for panel in figure.axes)
        for text in legend.get_texts():
            assert text.get_fontsize() >= 9
            assert not re.search("[A-Z]{3}|_", text.get_text())
    for panel in figure.axes:
        # Names and numbers of bars too.
        assert panel.get_window_extent().width > 100
        for text in panel.texts:
            assert text.get_window_extent().x1 <= panel.get_window_extent().x1
