"""A session that was recorded with evidence and transcript, what the checker says of it, and its records."""

from __future__ import annotations

import contextlib
import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from local_session import LocalGpus
from models import RandomModel, model_folder, random_token_ids

from tsqp_shm import SamplingParams

CHECKER = Path(__file__).parents[1] / "scripts" / "check_transcript.py"
check = runpy.run_path(str(CHECKER))["check"]
MODELS = [
    RandomModel("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    RandomModel("qwen2", stored_as="float16", shards=True),
]


class Session(NamedTuple):
    model: Path
    evidence: Path
    transcript: Path


def files_in(folder: Path) -> dict[str, Path]:
    return {"evidence": folder / "run.json", "transcript": folder / "run.transcript"}


def recorded(model: RandomModel, folder: Path, gpus: LocalGpus) -> Session:
    """Requests beside each other, prompts in chunks and in blocks, one with two completions, and logits without one."""
    path, files = model_folder(model), files_in(folder)
    limits = {"max_model_len": 96, "max_num_seqs": 3, "max_batch_tokens": 32, "block_rows": 16}
    one = SamplingParams(max_tokens=4, temperature=1.0, ignore_eos=True)
    two = SamplingParams(n=2, max_tokens=3, temperature=1.0, prompt_logprobs=0)
    with gpus.llm(path, mode="verified", **limits, **files) as llm:
        llm.generate([random_token_ids(length, seed=length) for length in (3, 40, 17)], [one, one, two])
        llm.logits(random_token_ids(20, seed=1))
    return Session(path, **files)


def problems_of(session: Session) -> list[str]:
    problems, _ = check(session.model, json.loads(session.evidence.read_text()), session.transcript.read_bytes())
    return problems


def copied(session: Session, folder: Path) -> Session:
    return Session(session.model, *(Path(shutil.copy(path, folder)) for path in session[1:]))


@contextlib.contextmanager
def changed_evidence(session: Session) -> Iterator[dict[str, Any]]:
    """The evidence, to be changed in the block."""
    evidence = json.loads(session.evidence.read_text())
    yield evidence
    session.evidence.write_text(json.dumps(evidence))


def words_of(session: Session) -> tuple[bytes, np.ndarray]:
    head, _, body = session.transcript.read_bytes().partition(b"\n")
    return head + b"\n", np.frombuffer(body, "<u4").copy()


def records_of(session: Session) -> tuple[bytes, list[np.ndarray]]:
    """The words of a transcript, cut into its records."""
    head, words = words_of(session)
    linears, records, at = json.loads(head)["linears"], [], 0
    while at < len(words):
        kind, count = (int(word) for word in (words[at], words[min(at + 1, len(words) - 1)]))
        if kind == 1:
            length = 2 + 5 * count
        elif kind == 2:
            linear = linears[count]
            length = 4 + int(words[at + 3]) * (linear["inputs"] + linear["outputs"])
        else:
            length = 1
        records.append(words[at : at + length])
        at += length
    return head, records


def written(session: Session, head: bytes, records: list[np.ndarray]) -> list[str]:
    session.transcript.write_bytes(head + b"".join(record.tobytes() for record in records))
    return problems_of(session)


def of_kind(records: list[np.ndarray], kind: int, first: int = 0) -> int:
    """The place of the next such record."""
    return next(place for place in range(first, len(records)) if records[place][0] == kind)
