"""What a benchmark measures: the cases, and one job as its contenders are given it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        default_tokens: tokens of the prompt of each sequence.
        new_tokens: tokens that each sequence decodes, timed; 0: the prefill is what is timed, to its last row's logits.
        sequences: batch sizes to measure.
    """

    name: str
    default_tokens: int
    new_tokens: int
    sequences: tuple[int, ...] = (1,)

    @property
    def per(self) -> str:
        """What the numbers of a row are for one of."""
        return "token" if self.new_tokens else "prefill"


CASES = {
    case.name: case
    for case in (
        Case("prefill", default_tokens=1024, new_tokens=0),
        Case("decode", default_tokens=512, new_tokens=32),
        Case("batch", default_tokens=128, new_tokens=32, sequences=(1, 8)),
    )
}


@dataclass(frozen=True)
class Job:
    """What a contender is started with.

    Attributes:
        tokens: of each sequence's prompt.
        new_tokens, sequences: as in `Case`.
        threads: of each process that computes.
        timeout_s: longest wait for another process of the same contender.
    """

    contender: str
    model: str
    tokens: int
    new_tokens: int
    sequences: tuple[int, ...]
    threads: int
    dtype: str
    device: str
    timeout_s: float

    @property
    def total_tokens(self) -> int:
        """The positions that a sequence needs: a batch that is prefilled in steps decodes meanwhile."""
        return self.tokens + 2 * (self.new_tokens + max(self.sequences)) + max(self.sequences) * self.tokens // 1024

    def prompts(self, vocab_size: int, sequences: int) -> list[list[int]]:
        """Random token ids, the same for every contender and repetition."""
        drawn = np.random.default_rng(0).integers(0, vocab_size, (sequences, self.tokens))
        prompts: list[list[int]] = drawn.tolist()
        return prompts

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**{**fields, "sequences": tuple(fields["sequences"])})
