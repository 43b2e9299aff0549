"""A column's own side: it computes the logits of each text and the answer to each question, and prints its scores.

The first column is the truth: it leaves its logits in a folder, where the others find them. A text's logits are some
hundred megabytes; they stay in the process that computes with them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tsqp_shm.bench.quality.scores import Float32, scores_of
from tsqp_shm.printable import print_json


@dataclass(frozen=True)
class ColumnJob:
    """What a column is started with, as JSON in a file.

    Attributes:
        kind: a dtype of transformers, or a mode.
        truth_folder: of the truth's logits.
        is_truth: whether this column leaves them there.
        texts, prompts: token ids.
        eos_token_ids: any of them ends an answer.
        settings: of the mode.
    """

    kind: str
    model: str
    truth_folder: str
    is_truth: bool
    texts: list[list[int]]
    prompts: list[list[int]]
    max_new_tokens: int
    eos_token_ids: list[int]
    settings: dict[str, Any]

    @property
    def positions(self) -> int:
        """What the longest sequence needs."""
        prompts = (len(prompt) + self.max_new_tokens for prompt in self.prompts)
        return max([*map(len, self.texts), *prompts])

    def truth_file(self, text: int) -> Path:
        return Path(self.truth_folder) / f"{text}.npy"

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


class Column(Protocol):
    """A loaded model."""

    def logits(self, token_ids: list[int]) -> Float32:
        """Shapes: [T, V] f32."""

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        """Token ids, each the likeliest, to the end or to so many."""


def run_column(load: Callable[[ColumnJob, ExitStack], Column]) -> int:
    """Plays the column of `COMMAND JOB_FILE`. Returns the exit code."""
    job = ColumnJob(**json.loads(Path(sys.argv[1]).read_text()))
    with ExitStack() as stack:
        column = load(job, stack)
        scores = []
        for number, token_ids in enumerate(job.texts):
            logits = column.logits(token_ids)
            if job.is_truth:
                np.save(job.truth_file(number), logits)
            truth = np.load(job.truth_file(number), mmap_mode="r")
            scores.append(asdict(scores_of(logits, truth, token_ids)))
            # The next text's take its place.
            del logits
        answers = column.answers(job.prompts)
    print_json({"scores": scores, "answers": answers})
    return 0
