"""What the columns found, beside each other."""

from __future__ import annotations

from typing import Any, TextIO

from tsqp_shm.printable import shown

_LEGEND = """\
top-1: share of likeliest tokens that are float32's; largest: difference of a logit, in deviations of float32's logits;
KL: of float32's distribution from the column's, nats a token"""


def print_table(document: dict[str, Any], out: TextIO) -> None:
    facts, columns = document["environment"], document["columns"]
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}, commit {(facts['commit'] or '-')[:12]}"
    print(f"{document['settings']['model']}; {facts['cores']} cores of {facts['processor']}; {versions}", file=out)
    print(_LEGEND, file=out)
    for number, text in enumerate(document["texts"]):
        truth = columns[0]["scores"][number]
        print(f"\n{text}, {truth['predictions']:,.0f} predictions", file=out)
        print(f"{'column':<24}{'perplexity':>12}{'/ float32':>11}{'top-1':>8}{'largest':>10}{'KL':>10}", file=out)
        for column in columns:
            scores = column["scores"][number]
            ratio = scores["perplexity"] / truth["perplexity"]
            distance = f"{scores['top1']:>8.4f}{scores['largest']:>10.2e}{scores['kl']:>10.2e}"
            print(f"{column['column']:<24}{scores['perplexity']:>12.4f}{ratio:>11.4f}{distance}", file=out)
    for number, question in enumerate(document["questions"]):
        print(f"\n{question}", file=out)
        for column in columns:
            answer = column["answers"][number]
            is_same = column is not columns[0] and answer == columns[0]["answers"][number]
            # UNTRUSTED: a model's words are shown and not obeyed.
            print(f"  {column['column']:<22}{'the same' if is_same else shown(answer, lines=False)}", file=out)
