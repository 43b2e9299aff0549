"""`tsqp-shm replay`: one request of a session's evidence, computed again in the TEE process alone, and held against it.

Every mode of the arithmetic `w8` gives the same bits, whatever ran beside a request and however often a GPU process was
replaced: the same model, prompt, params and seed are the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from tsqp_shm.errors import ConfigError, EvidenceError, IntegrityError, NumericsError, RequestError, TsqpError
from tsqp_shm.llm import LLM
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.evidence import SCHEMA
from tsqp_shm.tee.receipts import NONCE_BYTES, NONCES_SCHEMA, Receipt, canonical
from tsqp_shm.tee.sampling_params import SamplingParams

# Lays out the prompt as whoever asked did, with some params.
Start = Callable[[LLM, SamplingParams], Completion]
# Endings that are nobody's but the moment's: as far as the answer came, it is compared.
_BY_THE_MOMENT = ("cancelled", "deadline")


class Finding(NamedTuple):
    """One thing that was compared.

    Attributes:
        said: in words, where it differs.
    """

    what: str
    agrees: bool
    said: str


@dataclass(frozen=True)
class Answer:
    """One completion of a request, as its evidence says it."""

    index: int
    answer: str
    answer_tokens: int
    max_tokens: int
    finish_reason: str
    error: str | None

    @classmethod
    def of(cls, record: dict[str, Any]) -> Answer:
        """Raises:
        KeyError, TypeError: it is none.
        """
        found = cls(*(record[field.name] for field in fields(cls)))
        if not all(type(count) is int and count >= 0 for count in (found.index, found.answer_tokens, found.max_tokens)):
            raise TypeError("a count is no whole number")
        return found


class Request(NamedTuple):
    """A request as its evidence and its requester's file say it.

    Attributes:
        mode, model_digest, max_model_len: of the session.
        prompt: its hash.
        params: None where the requester's file is of other ones.
    """

    mode: str
    model_digest: str
    max_model_len: int
    receipt: Receipt
    prompt: str
    params: SamplingParams | None
    answers: list[Answer]


def read_request(evidence: Path, nonces: Path, number: int | None) -> Request:
    """Args:
        number: of the request; None: there is one alone.

    Raises:
        EvidenceError: a file cannot be read, or is not of its form.
        ConfigError: there is no such request, or several.
    """
    content, opening = _read(evidence, SCHEMA), _read(nonces, NONCES_SCHEMA)
    try:
        records = {record["request"]: record for record in content["requests"]}
        opened = {entry["request"]: entry for entry in opening["requests"]}
        if number is None and len(records) != 1:
            raise ConfigError("request", None, f"--request N, one of {_listed(records)}")
        number = next(iter(records)) if number is None else number
        if number not in records or number not in opened:
            both = sorted(records.keys() & opened.keys())
            raise ConfigError("request", number, f"one that both files have: {_listed(both)}")
        record, entry = records[number], opened[number]
        receipt = Receipt(number, bytes.fromhex(entry["nonce"]))
        if len(receipt.nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
        given = SamplingParams(**{**record["params"], **entry["params"]})
        agrees = canonical(receipt.params(given, given.seed)) == canonical(record["params"])
        session = content["session"]
        return Request(
            session["mode"],
            session["model_digest"],
            session["max_model_len"],
            receipt,
            record["prompt"],
            given if agrees else None,
            [Answer.of(each) for each in record["completions"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError) and error.field == "request":
            raise
        raise EvidenceError(
            evidence, f"not evidence, with {nonces} beside it: {type(error).__name__}: {error}"
        ) from error


def compare(llm: LLM, request: Request, start: Start) -> list[Finding]:
    """Computes a request again, as far as it is the same one.

    Args:
        llm: in mode `tee-only`, on the model that the evidence names.
        start: what makes the prompt of it.
    """
    receipt, params = request.receipt, request.params
    findings = [Finding("params", params is not None, "are other ones than the request's")]
    if params is None:
        return findings
    # The moment at which it ended is not to be had again.
    params = replace(params, deadline_s=None)
    first = start(llm, replace(params, n=1))
    is_prompt = receipt.hash_tokens(first.prompt_token_ids) == request.prompt
    findings.append(Finding("prompt", is_prompt, f"is another one, of {len(first.prompt_token_ids)} tokens"))
    if is_prompt:
        findings += [_compare_answer(llm, receipt, params, first.prompt_token_ids, said) for said in request.answers]
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """0: all agrees; 4: another answer to the same request; 1: it is another request."""
    differing = {finding.what for finding in findings if not finding.agrees}
    if differing & {"params", "prompt"}:
        return TsqpError.exit_code
    return IntegrityError.exit_code if differing else 0


def _compare_answer(llm: LLM, receipt: Receipt, params: SamplingParams, prompt: Sequence[int], said: Answer) -> Finding:
    what = "answer" if params.n == 1 else f"answer {said.index}"
    is_cut = said.finish_reason in _BY_THE_MOMENT
    most = said.answer_tokens if is_cut else said.max_tokens
    completion = Completion(
        prompt,
        params,
        min(most, llm.max_model_len - len(prompt)),
        llm.spec.eos_token_ids,
        llm.tokenizer,
        vocab_size=llm.spec.vocab_size,
        index=said.index,
        seed=params.seed,
    )
    failure = None
    if completion.max_tokens > 0:
        try:
            for _ in llm.stream_completion(completion):
                pass
        except (NumericsError, RequestError) as error:
            failure = type(error).__name__
    if receipt.hash_tokens(completion.token_ids) != said.answer:
        return Finding(what, False, f"is another one, of {len(completion.token_ids)} tokens")
    if not is_cut and (completion.finish_reason, failure) != (said.finish_reason, said.error):
        return Finding(what, False, f"is the same, and ended by {failure or completion.finish_reason}")
    return Finding(what, True, "")


def _read(path: Path, schema: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise EvidenceError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise EvidenceError(path, f"not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise EvidenceError(path, f"not a file of the form {schema!r}")
    return content


def _listed(numbers: Any) -> str:
    found = sorted(numbers)
    return ", ".join(map(str, found[:20])) + (", ..." if len(found) > 20 else "") or "none"
