#!/usr/bin/env python3
"""Show what a mode hides from whoever has the GPU process: `plain` and `verified` nothing, `blinded` the numbers.

Runs beside a live session, as the same user, and only reads: it maps the session's arena from outside and follows the
doorbell. It rebuilds the conversation twice:

  token ids    from the slot in which they cross; in `verified` they do not
  activations  from the rows that the first Linear reads, which are
               normalised embeddings (in `verified` as integers, each row by a
               scale of its own): each is compared with every row of the
               model's embedding table, and the one of the nearest direction
               names the token

In `verified` nothing tells which rows are whose: of several sequences at once it shows rows in the order of passes.

In `blinded` the same is done, and gives what it gives of random words: these are read beside it, and what has crossed
is tested for being uniform. How many rows cross in which pass is seen as before.

  scripts/read_arena.py --session demo --expect "Once upon a time" &
  tsqp-shm launch --session demo --mode verified --prompt "Once upon a time"
"""

from __future__ import annotations

import difflib
import mmap
import os
import sys
import time
from abc import ABC, abstractmethod
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from script_flags import ScriptParser
from uniform_words import p_values

from tsqp_shm.demo.model import demo_model_folder
from tsqp_shm.errors import TsqpError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.model.weights import Checkpoint, bfloat16_to_float32
from tsqp_shm.shm import layout
from tsqp_shm.shm.invitation import Invitation
from tsqp_shm.shm.plan import Plan, Slot
from tsqp_shm.shm.posix.objects import SHM_FOLDER
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Record

# Between two looks. A layer takes longer.
LOOK_S = 20e-6
COMPARED_AT_ONCE = 64
FIELD = 2**31 - 1
# Below it a test calls words not uniform: one true alarm in a million.
ALPHA = 1e-6
SUBMISSION_TAIL, COMPLETION_TAIL = layout.CONTROL_OFFSET_BYTES, layout.CONTROL_OFFSET_BYTES + 3 * 128

Rows = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]


@dataclass
class Step:
    """A block of a forward pass: where each row belongs, its token if that crosses, and its activations if they were
    caught, with the words that they were made of."""

    places: list[tuple[int, int]]
    token_ids: list[int]
    activations: Rows | None
    words: Words | None = None


@dataclass
class Reader(ABC):
    """A session's arena, mapped for reading only.

    Attributes:
        first_product: what asks for the product of the first layer's q, k and v.
    """

    first_product: ClassVar[Opcode]
    fd: int
    plan: Plan
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._memory = mmap.mmap(self.fd, self.plan.total_bytes, prot=mmap.PROT_READ)
        self._words = memoryview(self._memory).cast("Q")

    def follow(self) -> None:
        """Reads what crosses until the session has removed its arena."""
        read = 0
        while os.fstat(self.fd).st_nlink:
            for _ in range(1000):
                submitted = self._word(SUBMISSION_TAIL)
                read = max(read, submitted - layout.RING_DEPTH)
                while read < submitted:
                    record = self._record(read)
                    read += 1
                    if (record.opcode, record.target) == (self.first_product, 0) and record.sequence == read:
                        self._read_step(record)
                time.sleep(LOOK_S)

    @abstractmethod
    def _read_step(self, qkv: Record) -> None:
        """Reads what lies there for the first Linear."""

    def _word(self, offset_bytes: int) -> int:
        return self._words[offset_bytes // 8]

    def _record(self, position: int) -> Record:
        start = layout.SUBMISSION_RING_OFFSET_BYTES + position % layout.RING_DEPTH * layout.RECORD_BYTES
        return Record.unpack(self._memory[start : start + layout.RECORD_BYTES])

    def _slot(self, name: str) -> npt.NDArray[np.generic]:
        slot: Slot = self.plan.slot(name)
        count = slot.num_rows * slot.row_elements
        flat = np.frombuffer(self._memory, layout.DTYPES[slot.dtype].numpy, count, slot.offset_bytes)
        return flat.reshape(slot.num_rows, slot.row_elements)


class PlainReader(Reader):
    """Of a session in clear."""

    first_product = Opcode.QKV

    def _read_step(self, qkv: Record) -> None:
        rows = slice(qkv.first_row, qkv.first_row + qkv.rows)
        x = self._slot("x")[rows].copy()
        is_whole = not self._is_over(qkv)
        token_ids = self._slot("tokens")[rows, 0].tolist()
        places: list[tuple[int, int]] = []
        for sequence, position, first_row, count in self._slot("segments").tolist():
            # What lies behind the step's last segment is of an earlier step.
            if first_row != len(places) or len(places) >= rows.stop:
                break
            places += [(sequence, position + row) for row in range(count)]
        activations = bfloat16_to_float32(x) if x.dtype == np.uint16 else x.astype(np.float32)
        self.steps.append(Step(places[rows], token_ids, activations if is_whole else None))

    def _is_over(self, qkv: Record) -> bool:
        """Whether x may hold the layer's second norm by now: the attention of these rows is complete."""
        for position in range(qkv.sequence, self._word(SUBMISSION_TAIL)):
            record = self._record(position)
            if record.sequence != position + 1 or record.opcode == Opcode.EMBED:
                return True
            is_last = record.opcode == Opcode.CONTEXT and record.out_slot != NO_SLOT
            if is_last and record.first_row == qkv.first_row:
                return self._word(COMPLETION_TAIL) >= record.sequence
        return False


class FieldReader(Reader):
    """Of a session whose products are of the field: what is multiplied lies there as words, in clear or blinded."""

    first_product = Opcode.LINEAR
    _passes = 0

    def _read_step(self, qkv: Record) -> None:
        rows = slice(qkv.first_row, qkv.first_row + qkv.rows)
        m = self._slot("m.x")[rows].astype(np.uint32)
        is_whole = not self._is_over(qkv)
        if qkv.first_row == 0:
            self._passes += 1
        places = [(self._passes, row) for row in range(rows.start, rows.stop)]
        self.steps.append(Step(places, [], centred(m), m) if is_whole else Step(places, [], None))

    def _is_over(self, qkv: Record) -> bool:
        """Whether m.x may hold the layer's second norm by now: what attention makes of these rows is multiplied."""
        for position in range(qkv.sequence, self._word(SUBMISSION_TAIL)):
            record = self._record(position)
            if record.sequence != position + 1:
                return True
            if (record.opcode, record.target, record.first_row) == (Opcode.LINEAR, 1, qkv.first_row):
                return self._word(COMPLETION_TAIL) >= record.sequence
        return False


READERS = {"plain": PlainReader, "verified": FieldReader, "blinded": FieldReader}


class EmbeddingTable:
    """The model's embedding rows as the first Linear would see them: weighted by its norm, of length one.

    Attributes:
        directions: [V, C].
    """

    def __init__(self, model: Path, network: Network) -> None:
        first_norm = network.layers[0].attention_norm
        with Checkpoint.open(model) as checkpoint:
            rows, weight = (
                checkpoint.tensor(name, shape).to_float32()
                for part in (network.embedding, first_norm)
                for name, shape in part.tensors()
            )
        scale = np.sqrt(np.mean(rows * rows, axis=1, keepdims=True) + first_norm.eps)
        self.directions = rows / scale * weight
        self.directions /= np.linalg.norm(self.directions, axis=1, keepdims=True) + 1e-30

    def nearest(self, activations: Rows) -> list[int]:
        """The token of each row. Shapes: activations [T, C]."""
        found: list[int] = []
        for first in range(0, len(activations), COMPARED_AT_ONCE):
            found += np.argmax(activations[first : first + COMPARED_AT_ONCE] @ self.directions.T, axis=1).tolist()
        return found


def conversation(tokens: dict[tuple[int, int], int]) -> list[int]:
    """Token ids in the order of sequence and position."""
    return [tokens[place] for place in sorted(tokens)]


def centred(m: Words) -> Rows:
    """What words of the field stand for: above half of it, for negative numbers."""
    words = m.astype(np.int64)
    return np.where(words > FIELD // 2, words - FIELD, words).astype(np.float32)


def recovered(expected: list[int], found: list[int]) -> float:
    """How much of the expected ids was found, in its order."""
    blocks = difflib.SequenceMatcher(None, expected, found, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(expected)


def report(title: str, ids: list[int], tokenizer: Tokenizer, expect: str | None) -> None:
    text = tokenizer.decode(ids) if ids else "nothing was caught"
    print(f"{title}: {len(ids)} tokens: {text!r}")
    if expect:
        print(f"{title}: {recovered(tokenizer.encode(expect), ids):.1%} of the expected text's tokens")


def report_words(words: Words, table: EmbeddingTable, tokenizer: Tokenizer, expect: str | None) -> None:
    """Whether they are uniform, and what is found in as many that are."""
    random = np.random.default_rng().integers(0, FIELD, words.shape, np.uint32)
    report("random words in their place", table.nearest(centred(random)), tokenizer, expect)
    found = p_values(words)
    least = min(found, key=lambda test: found[test])
    verdict = "not uniform" if found[least] < ALPHA else "as uniform ones are, as far as these tests tell"
    print(f"words: {words.size:,}, smallest of {len(found)} p-values {found[least]:.2g} ({least}): {verdict}")


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="the session's model (the demo model)")
    parser.add_argument("--session", required=True, metavar="NAME", help="the session to read, live or about to begin")
    parser.add_argument("--expect", metavar="TEXT", help="say how much of this text's tokens was found")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="for the session to begin (60)")
    arguments = parser.parse_args()
    say = lambda line: print(f"read_arena: {line}", file=sys.stderr)  # noqa: E731
    try:
        model = arguments.model or demo_model_folder(say)
        spec, tokenizer = ModelSpec.from_folder(model), Tokenizer.from_folder(model)
        with closing(PosixTransport(arguments.session).join(arguments.timeout, say)) as joined:
            arena, invitation = joined.name, Invitation.parse(joined.invitation)
        network = Network.of(spec)
        plan = Plan.derive(network, invitation.limits)
        fd = os.open(Path(SHM_FOLDER) / arena.removeprefix("/"), os.O_RDONLY)
        if os.fstat(fd).st_size != plan.total_bytes:
            raise TsqpError("the session runs another model; name its folder")
        if invitation.doorbell == "zmq":
            raise TsqpError("a session with --doorbell zmq has no records in its arena to follow")
        say(f"reading {arena}, {plan.total_bytes:,} bytes, until the session ends")
        reader = READERS[invitation.limits.mode](fd, plan)
        reader.follow()
        table = EmbeddingTable(model, network)
    except (TsqpError, OSError) as error:
        say(f"error: {error}")
        return 1
    ids: dict[tuple[int, int], int] = {}
    seen: dict[tuple[int, int], int] = {}
    for step in reader.steps:
        ids.update(zip(step.places, step.token_ids, strict=False))
        if step.activations is not None:
            seen.update(zip(step.places, table.nearest(step.activations), strict=False))
    if invitation.limits.mode == "plain":
        report("token ids", conversation(ids), tokenizer, arguments.expect)
    else:
        print("token ids: do not cross")
    report("activations", conversation(seen), tokenizer, arguments.expect)
    words = [step.words for step in reader.steps if step.words is not None]
    if words:
        report_words(np.concatenate(words), table, tokenizer, arguments.expect)
    return 0


if __name__ == "__main__":
    sys.exit(main())
