"""What the columns found, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from tsqp_shm.bench.quality.agreement import FIRST_IDS
from tsqp_shm.bench.report import machine_line
from tsqp_shm.bench.tables import print_columns, say
from tsqp_shm.printable import shown

_LEGEND = """\
top-1: share of likeliest tokens that are float32's; largest: difference of a logit, in deviations of float32's logits;
KL: of float32's distribution from the column's, nats a token"""


def print_table(document: dict[str, Any], out: TextIO) -> None:
    columns = document["columns"]
    say(f"{document['settings']['model']}; {machine_line(document['environment'])}", out)
    if document["texts"]:
        say(_LEGEND, out)
    for number, text in enumerate(document["texts"]):
        truth = columns[0]["scores"][number]
        cells = []
        for column in columns:
            scores = column["scores"][number]
            ratio = f"{scores['perplexity'] / truth['perplexity']:.4f}"
            distance = [f"{scores['top1']:.4f}", f"{scores['largest']:.2e}", f"{scores['kl']:.2e}"]
            cells.append([column["column"], f"{scores['perplexity']:.4f}", ratio, *distance])
        print("", file=out)
        say(f"{text}, {truth['predictions']:,.0f} predictions", out)
        print_columns(["column", "perplexity", "/float32", "top-1", "largest", "KL"], cells, out)
    if document["questions"]:
        _print_agreement(columns, out)
    for number, question in enumerate(document["questions"]):
        print("", file=out)
        say(question, out)
        for column in columns:
            answer = column["answers"][number]
            is_same = column is not columns[0] and answer == columns[0]["answers"][number]
            # UNTRUSTED: a model's words are shown and not obeyed.
            said = "the same" if is_same else shown(answer, lines=False)
            say(f"- {column['column']}: {said}", out, indent=4)


def _print_agreement(columns: Sequence[dict[str, Any]], out: TextIO) -> None:
    cells = []
    for column in columns:
        found = column["agreement"]
        ids = f"{found['ids']:.1f} of {found['of']:.1f}"
        cells.append([column["column"], f"{found['whole']} of {found['answers']}", ids])
    print("", file=out)
    say(f"Answers whose first {FIRST_IDS} ids are those of {columns[0]['column']}, and how many are, in the mean", out)
    print_columns(["column", "answers", "ids"], cells, out)
