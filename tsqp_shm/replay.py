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
        said: in words, what it is or how it differs.
        is_compared: False: there was nothing to hold it against, and it does not agree by that.
        text, token_ids: of an answer, as it was computed again.
    """

    what: str
    agrees: bool
    said: str
    is_compared: bool = True
    text: str | None = None
    token_ids: list[int] | None = None


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
        prompt, prompt_tokens: its hash, and how many there are.
        params: None where the requester's file is of other ones.
    """

    mode: str
    model_digest: str
    max_model_len: int
    receipt: Receipt
    prompt: str
    prompt_tokens: int
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
        answers = sorted((Answer.of(each) for each in record["completions"]), key=lambda answer: answer.index)
        # Of one that is left out nothing would be compared.
        if len(answers) != given.n or any(answer.index != index for index, answer in enumerate(answers)):
            raise ValueError(f"its completions are not the {given.n} that were asked for, each once")
        return Request(
            session["mode"],
            session["model_digest"],
            session["max_model_len"],
            receipt,
            record["prompt"],
            record["prompt_tokens"],
            given if agrees else None,
            answers,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError) and error.field == "request":
            raise
        raise EvidenceError(
            evidence, f"not evidence, with {nonces} beside it: {type(error).__name__}: {error}"
        ) from error


def asked_for(params: SamplingParams) -> dict[str, Any]:
    """What is not as it is where nobody has asked for anything."""
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    return {name: value for name, value in values.items() if value != getattr(SamplingParams(), name)}


def compare(llm: LLM, request: Request, start: Start, printed: bytes | None = None) -> list[Finding]:
    """Computes a request again, as far as it is the same one.

    Args:
        llm: in mode `tee-only`, on the model that the evidence names.
        start: what makes the prompt of it.
        printed: the answer that its requester has, as launch prints it; None: he has not said it.

    Raises:
        ConfigError: one was printed, of a request with several.
    """
    receipt, params = request.receipt, request.params
    if params is None:
        return [Finding("params", False, "are other ones than the request's")]
    if printed is not None and params.n != 1:
        raise ConfigError("answer", "one", f"none, as the request has {params.n} completions")
    # Who has written both files may have chosen them: whoever asked has to look.
    said = ", ".join(f"{name}={value!r}" for name, value in asked_for(params).items()) or "none but defaults"
    findings = [Finding("params", True, said)]
    first = start(llm, replace(params, n=1, deadline_s=None))
    prompt = first.prompt_token_ids
    is_prompt = (receipt.hash_tokens(prompt), len(prompt)) == (request.prompt, request.prompt_tokens)
    findings.append(Finding("prompt", is_prompt, f"{'' if is_prompt else 'is another one, of '}{len(prompt)} tokens"))
    if is_prompt:
        findings += [_compare_answer(llm, receipt, params, prompt, answer) for answer in request.answers]
    if is_prompt and printed is not None:
        is_cut = request.answers[0].finish_reason in _BY_THE_MOMENT
        findings.append(_compare_text(findings[-1].text or "", printed, is_cut=is_cut))
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """0: all was compared and agrees; 4: another answer to the same request; 1: it is another request, or there was
    nothing to compare."""
    differing = {finding.what for finding in findings if not finding.agrees and finding.is_compared}
    if differing & {"params", "prompt"}:
        return TsqpError.exit_code
    if differing:
        return IntegrityError.exit_code
    has_answer = any(finding.token_ids is not None for finding in findings)
    return 0 if has_answer and all(finding.agrees for finding in findings) else TsqpError.exit_code


def _compare_answer(llm: LLM, receipt: Receipt, params: SamplingParams, prompt: Sequence[int], said: Answer) -> Finding:
    what = "answer" if params.n == 1 else f"answer {said.index}"
    room = llm.max_model_len - len(prompt)
    most = room if params.max_tokens is None else min(params.max_tokens, room)
    if said.max_tokens != most:
        return Finding(what, False, f"might have {most} tokens by these params, and not {said.max_tokens}")
    is_cut = said.finish_reason in _BY_THE_MOMENT
    if said.finish_reason == "deadline" and params.deadline_s is None:
        return Finding(what, False, "is said to have ended by a deadline, and there was none")
    if is_cut and said.answer_tokens == 0 and said.answer == receipt.hash_tokens([]):
        return Finding(
            what, False, f"has no token to compare: it ended by {said.finish_reason} before", is_compared=False
        )
    completion, failure = _computed(llm, params, prompt, said, min(most, said.answer_tokens) if is_cut else most)
    found, count = completion.token_ids, f"{len(completion.token_ids)} tokens"
    ended_by = failure or completion.finish_reason
    agrees, words = True, f"{count}, ended by {ended_by}"
    if (receipt.hash_tokens(found), len(found)) != (said.answer, said.answer_tokens):
        agrees, words = False, f"is another one, of {count}"
    elif is_cut:
        words = f"{count}, as far as it came; it was cut ({said.finish_reason}), and of the rest nothing is said"
    elif (completion.finish_reason, failure) != (said.finish_reason, said.error):
        agrees, words = False, f"is the same, and ended by {ended_by}"
    return Finding(what, agrees, words, text=completion.text, token_ids=found)


def _computed(
    llm: LLM, params: SamplingParams, prompt: Sequence[int], said: Answer, most: int
) -> tuple[Completion, str | None]:
    """The answer, and the class of the error that has ended it."""
    completion = Completion(
        prompt,
        # The moment at which it ended is not to be had again.
        replace(params, deadline_s=None),
        most,
        llm.spec.eos_token_ids,
        llm.tokenizer,
        vocab_size=llm.spec.vocab_size,
        index=said.index,
        seed=params.seed,
    )
    if most > 0:
        try:
            for _ in llm.stream_completion(completion):
                pass
        except (NumericsError, RequestError) as error:
            return completion, type(error).__name__
    return completion, None


def _compare_text(text: str, printed: bytes, *, is_cut: bool) -> Finding:
    """Of an answer that was cut, what was printed may lack what was held back for the next token."""
    given, computed = printed.removesuffix(b"\n"), text.encode()
    if not given and (is_cut or not computed):
        return Finding("yours", False, "has no text to compare", is_compared=False)
    agrees = computed.startswith(given) if is_cut else computed in (printed, given)
    return Finding("yours", agrees, f"{len(given)} bytes" if agrees else "is another text")


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
