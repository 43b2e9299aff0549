"""`tsqp-shm replay FILE.json [MODEL]`: a request of a session's evidence once more."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tsqp_shm.cli.parser import Parser
from tsqp_shm.cli.settings import blocked_interrupts, model_folder, prompt_text, reporter
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import ConfigError
from tsqp_shm.printable import print_json
from tsqp_shm.roles.lifeline import Lifeline
from tsqp_shm.wrapping import beside

if TYPE_CHECKING:
    from tsqp_shm.replay import Finding, Request

# Longer than any answer.
_MAX_ANSWER_BYTES = 1 << 26


def replay_flags() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("file", type=Path, metavar="FILE.json", help="what --evidence has written")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="the model of that session; without it, the demo model"
    )
    request = parser.add_argument_group("request")
    request.add_argument(
        "--nonce", type=Path, required=True, metavar="FILE", help="what opens its record: FILE.nonces.json of launch"
    )
    request.add_argument("--request", type=int, metavar="N", help="its number in FILE.json (the one that there is)")
    request.add_argument("--prompt", metavar="TEXT", help="what was asked")
    request.add_argument("--prompt-file", metavar="FILE", help="the same from a file, or from - (stdin)")
    request.add_argument("--chat", action="store_true", help="the model's chat template was applied to it")
    request.add_argument(
        "--messages", type=Path, metavar="FILE", help="a whole conversation, as JSON: a list of role and content"
    )
    request.add_argument(
        "--answer", type=Path, metavar="FILE", help="what was answered, as launch has printed it: `launch ... > FILE`"
    )
    session = parser.add_argument_group("session")
    session.add_argument("--tee-threads", type=int, metavar="N", help="threads of the kernels (one per core)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser


def replay_request(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.llm import LLM
        from tsqp_shm.progress import Progress
        from tsqp_shm.replay import compare, exit_code, read_request
        from tsqp_shm.tee.completion import Completion
        from tsqp_shm.tee.sampling_params import SamplingParams

    asked = [name for name in ("prompt", "prompt_file", "messages") if getattr(arguments, name) is not None]
    if len(asked) != 1 or (arguments.messages is not None and arguments.chat):
        raise ConfigError("prompt", ", ".join(asked) or None, "one of --prompt, --prompt-file and --messages")
    messages = _messages(arguments.messages) if arguments.messages is not None else None
    prompt = None if messages is not None else prompt_text(arguments)
    if prompt is not None and arguments.chat:
        messages = [{"role": "user", "content": prompt}]
    printed = None if arguments.answer is None else _answer(arguments.answer)
    request = read_request(arguments.file, arguments.nonce, arguments.request)

    def start(llm: LLM, params: SamplingParams) -> Completion:
        return llm.start(llm.chat_prompt(messages) if messages is not None else prompt or "", params)

    config = EngineConfig(
        mode="tee-only",
        max_model_len=request.max_model_len,
        model_digest=request.model_digest,
        tee_threads=arguments.tee_threads,
    )
    model = model_folder(arguments)
    with Progress(arguments.quiet) as progress:
        progress.show(f"loading {model.name}")
        llm = LLM(model, report=reporter(arguments), config=config)
    with llm:
        findings = compare(llm, request, start, printed)
    if arguments.json:
        compared = [finding._asdict() for finding in findings]
        print_json({"request": request.receipt.request, "model": config.model_digest, "findings": compared})
    else:
        _print(request, findings, is_answer_given=printed is not None)
    return exit_code(findings)


def _print(request: Request, findings: Sequence[Finding], *, is_answer_given: bool) -> None:
    print(f"request {request.receipt.request} of a session in mode {request.mode}")
    print(f"  model   agrees: {request.model_digest}")
    for finding in findings:
        verdict = "agrees" if finding.agrees else "DIFFERS" if finding.is_compared else "NOT COMPARED"
        print(beside(f"  {finding.what:<8}", f"{verdict}: {finding.said}", sys.stdout))
    if not is_answer_given:
        # Nobody but the requester knows what he was answered, and which params he has asked for.
        for finding in findings:
            if finding.text is not None:
                print(f"{finding.what}, computed again, to be held against yours:\n{finding.text}")
    sys.stdout.flush()


def _answer(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_ANSWER_BYTES + 1)
    except OSError as error:
        raise ConfigError("answer", str(path), f"a readable file ({error.strerror})") from None
    if len(content) > _MAX_ANSWER_BYTES:
        raise ConfigError("answer", str(path), f"at most {_MAX_ANSWER_BYTES:,} bytes")
    return content


def _messages(path: Path) -> list[dict[str, str]]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError("messages", str(path), f"a JSON file ({error})") from None
    if not isinstance(content, list):
        raise ConfigError("messages", str(path), "a list of messages")
    return content
