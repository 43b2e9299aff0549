"""`tsqp-shm bench quality`: columns one after the other, each a process of its own, and what they found beside each
other."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from tsqp_shm.arguments import require_writable
from tsqp_shm.bench.contenders import KINDS, NO_ANSWER, require_installed
from tsqp_shm.bench.quality.agreement import agreement
from tsqp_shm.bench.quality.column import ColumnJob
from tsqp_shm.bench.quality.questions import read_questions, read_texts
from tsqp_shm.bench.quality.scores import Scores
from tsqp_shm.bench.quality.table import print_table
from tsqp_shm.bench.report import environment, put_out
from tsqp_shm.bench.scratch import scratch_folder
from tsqp_shm.bench.whole_run import run_whole
from tsqp_shm.config import EngineConfig, require_range
from tsqp_shm.errors import ConfigError, ContenderFailed
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.modes import MODES
from tsqp_shm.progress import Progress
from tsqp_shm.shm.posix.folder import swept_afterwards

# Scores, and the token ids of the answers.
_MAX_ANSWER_BYTES = 1 << 20
_TRANSFORMERS = "transformers-sdpa"


@dataclass(frozen=True)
class QualityOptions:
    """What was asked for; None: the default.

    Attributes:
        tokens: of each text, from its beginning; 0: none is read.
        questions: a file with one question a line.
        float32_rows: of the modes that take it.
        no_chat: questions are prompts as they are, without the model's chat template.
        max_new_tokens: of each answer; 0: nothing is asked.
        timeout_s: longest that a column may take.
    """

    model: str | None = None
    tokens: int = 2048
    modes: tuple[str, ...] = tuple(MODES)
    max_new_tokens: int = 48
    questions: str | None = None
    no_chat: bool = False
    float32_rows: int = EngineConfig.float32_rows
    json_file: str | None = None
    timeout_s: float = 1800.0
    quiet: bool = False


# The scores of each text, the token ids of each answer.
Found = tuple[list[dict[str, float]], list[list[int]]]


class _Kind(NamedTuple):
    """Attributes:
    name: of the column.
    program: the module that plays it.
    """

    name: str
    program: str
    kind: str


def run_quality(options: QualityOptions, demo_model: Callable[[], Path]) -> int:
    """Returns the exit code.

    Raises:
        ConfigError: an option is not allowed; before any work.
        ContenderFailed: a column cannot run, has died, or takes too long.
    """
    kinds = _columns(options)
    if options.tokens:
        require_range("tokens", options.tokens, 2, 1 << 20)
    require_range("float32_rows", options.float32_rows, 0, 1 << 20)
    require_range("max_new_tokens", options.max_new_tokens, 0, 1 << 20)
    if not 0 < options.timeout_s <= 86400:
        raise ConfigError("timeout", options.timeout_s, "seconds, more than 0 and at most 86400")
    require_writable("json", options.json_file)
    require_installed(_TRANSFORMERS)
    texts = read_texts() if options.tokens else {}
    asked = read_questions(options.questions) if options.max_new_tokens else ()
    folder = (demo_model() if options.model is None else Path(options.model)).absolute()
    spec, tokenizer = ModelSpec.from_folder(folder), Tokenizer.from_folder(folder)
    try:
        most = min(options.tokens, spec.max_positions)
        token_ids = {name: tokenizer.encode(text)[:most] for name, text in texts.items()}
        questions = _prompts(tokenizer, asked, is_chat=not options.no_chat)
        if not token_ids and not questions:
            raise ConfigError("tokens", 0, "some, where nothing is asked; a question without a template has --no-chat")
        facts = environment()
        with scratch_folder() as scratch, swept_afterwards(), Progress(options.quiet) as progress:
            job = ColumnJob("", str(folder), str(scratch), False, list(token_ids.values()), list(questions.values()),
                            options.max_new_tokens, list(spec.eos_token_ids), {})  # fmt: skip
            columns = []
            for number, kind in enumerate(kinds):
                progress.show(f"{kind.name} ({number + 1} of {len(kinds)})")
                columns.append(_run(kind, job, scratch, options, is_truth=number == 0))
        document = {
            "environment": facts,
            "settings": {
                "model": folder.name,
                "tokens": options.tokens,
                "max_new_tokens": options.max_new_tokens,
                "chat": not options.no_chat,
                "float32_rows": options.float32_rows,
            },
            "texts": list(token_ids),
            "questions": list(questions),
            "columns": [
                {
                    "column": kind.name,
                    "scores": scores,
                    "agreement": asdict(agreement(answers, columns[0][1])) if answers else None,
                    "answers": list(map(tokenizer.decode, answers)),
                }
                for kind, (scores, answers) in zip(kinds, columns, strict=True)
            ],
        }
    finally:
        tokenizer.close()
    put_out(document, options.json_file, None, print_table)
    return 0


def _columns(options: QualityOptions) -> list[_Kind]:
    """The truth first.

    Raises:
        ConfigError: there is no such mode.
    """
    modes = dict.fromkeys(options.modes)
    for mode in modes:
        if mode not in MODES:
            raise ConfigError("mode", mode, f"{', '.join(MODES)}, with commas between")
    others = [_Kind(f"transformers {dtype}", "of_transformers", dtype) for dtype in ("float32", "bfloat16")]
    return [*others, *(_Kind(mode, "of_mode", mode) for mode in modes)]


def _prompts(tokenizer: Tokenizer, questions: tuple[str, ...], *, is_chat: bool) -> dict[str, list[int]]:
    """The prompt of each question; none where the model has no chat template, and should have."""
    if not is_chat:
        return {question: tokenizer.encode(question) for question in questions}
    try:
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    except ConfigError:
        return {}
    prompts = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    return dict(zip(questions, prompts, strict=True))


def _run(kind: _Kind, job: ColumnJob, scratch: Path, options: QualityOptions, *, is_truth: bool) -> Found:
    job_file = scratch / "job.json"
    is_split = kind.kind in MODES and MODES[kind.kind].splits_attention
    settings = {"float32_rows": options.float32_rows} if is_split else {}
    ColumnJob(**{**vars(job), "kind": kind.kind, "is_truth": is_truth, "settings": settings}).write(job_file)
    command = [sys.executable, "-m", f"tsqp_shm.bench.quality.{kind.program}", str(job_file)]
    # Nothing is timed here: threads that spin would only keep a core from whoever shares it.
    variables = {**dict(KINDS[_TRANSFORMERS].environment), "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    text = run_whole(kind.name, command, variables, options.timeout_s, _MAX_ANSWER_BYTES).text
    # UNTRUSTED: what it says is numbers, or it is not taken.
    try:
        found = json.loads(text)
        scores = [{field.name: float(each[field.name]) for field in fields(Scores)} for each in found["scores"]]
        answers = [[token_id for token_id in answer if type(token_id) is int] for answer in found["answers"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ContenderFailed(kind.name, NO_ANSWER) from None
    if len(scores) != len(job.texts) or len(answers) != len(job.prompts):
        raise ContenderFailed(kind.name, NO_ANSWER)
    return scores, answers
