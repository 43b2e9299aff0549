"""What a benchmark measures: the cases, and one job as its contenders are given it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from tsqp_shm.config import EngineConfig, require_choice
from tsqp_shm.modes import MODES

OURS = "tsqp-shm"
# This system's contenders, each with its mode.
MODE_OF = {OURS if mode == EngineConfig.mode else f"{OURS}-{mode}": mode for mode in MODES}


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

    def turns(self, tokens: int) -> tuple[Turn, ...]:
        """With prompts of so many tokens."""
        return tuple(Turn(self.name, count, tokens, self.new_tokens) for count in self.sequences)


CASES = {
    case.name: case
    for case in (
        Case("prefill", default_tokens=1024, new_tokens=0),
        Case("decode", default_tokens=512, new_tokens=32),
        Case("batch", default_tokens=128, new_tokens=32, sequences=(1, 8)),
    )
}


def contenders_of(modes: tuple[str, ...]) -> list[str]:
    """This system in those modes, each once.

    Raises:
        ConfigError: one is none.
    """
    for mode in modes:
        require_choice("mode", mode, tuple(MODES))
    return [name for mode in dict.fromkeys(modes) for name, its in MODE_OF.items() if its == mode]


@dataclass(frozen=True)
class Turn:
    """One repetition's input: so many sequences, each with a prompt of so many tokens, decoding so many new ones.

    Attributes:
        case: whose it is.
        new_tokens: as in `Case`.
        lead_tokens: decoded before these, not timed; of a prefill, so many at least of the same prompt go before.
        stocked_rows: pads of mode blinded that are to be ready first, for so many rows.
    """

    case: str
    sequences: int
    tokens: int
    new_tokens: int = 0
    lead_tokens: int = 0
    stocked_rows: int = 0

    @property
    def per(self) -> str:
        """What its numbers are for one of."""
        return "token" if self.new_tokens else "prefill"

    @property
    def positions(self) -> int:
        """What a sequence needs: a batch that is prefilled in steps decodes meanwhile."""
        decoded = self.tokens + self.lead_tokens + self.new_tokens + 1
        if self.sequences == 1:
            return decoded
        return decoded + self.new_tokens + 2 * self.sequences + self.sequences * self.tokens // 1024

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same for every contender and repetition."""
        drawn = np.random.default_rng(0).integers(0, vocab_size, (self.sequences, self.tokens))
        prompts: list[list[int]] = drawn.tolist()
        return prompts


@dataclass(frozen=True)
class Job:
    """What a contender is started with.

    Attributes:
        turns: every input that it will be given.
        threads: of each process that computes.
        timeout_s: longest wait for another process of the same contender.
        settings: fields of `EngineConfig`, for tsqp-shm alone.
        label: what tells it from others of its kind, where that is not its settings.
        sleeps: all its processes are stopped but in its own turn.
    """

    contender: str
    model: str
    turns: tuple[Turn, ...]
    threads: int
    dtype: str
    device: str
    timeout_s: float
    settings: Mapping[str, int | str] = field(default_factory=dict)
    label: str = ""
    sleeps: bool = False

    @property
    def name(self) -> str:
        """The contender's, with the settings that tell it from others of its kind."""
        own = [self.label] if self.label else [f"{name.replace('_', '-')}={n}" for name, n in self.settings.items()]
        return " ".join([self.contender, *own])

    @property
    def max_sequences(self) -> int:
        return max(turn.sequences for turn in self.turns)

    @property
    def max_positions(self) -> int:
        return max(turn.positions for turn in self.turns)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**{**fields, "turns": tuple(Turn(**turn) for turn in fields["turns"])})
