"""One prompt, or a chat, from the bring-up report to the statistics."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tsqp_shm.console.answer import show, why_cut
from tsqp_shm.console.bring_up import print_bring_up
from tsqp_shm.console.chat import Chat
from tsqp_shm.console.notices import Notices
from tsqp_shm.console.statistics import print_line, print_tables, summary
from tsqp_shm.console.typed import Typed
from tsqp_shm.llm import LLM
from tsqp_shm.printable import print_json
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.receipts import nonces_path, write_nonces
from tsqp_shm.tee.sampling_params import SamplingParams


@dataclass(frozen=True)
class Wanted:
    """What is to be done in a session.

    Attributes:
        prompt: what to complete; None: turns of a chat are asked for.
        is_chat: whether the prompt is a message of a conversation.
        system: what the conversation begins with; None: what the model's template has.
        history_file: what keeps the lines that are typed; None: this process's memory.
        as_json: one object on standard output, and nothing else there.
        is_quiet: answers and errors only.
        is_verbose: all of the bring-up report, and tables.
    """

    prompt: str | None
    is_chat: bool = False
    system: str | None = None
    history_file: Path | None = None
    as_json: bool = False
    is_quiet: bool = False
    is_verbose: bool = False


def run_prompts(llm: LLM, params: SamplingParams, wanted: Wanted, notices: Notices) -> None:
    """Completes one prompt, or asks for them turn by turn, and prints what was asked for.

    The completion goes to stdout, everything else to stderr.

    Raises:
        RequestError: as `LLM.start`.
        EvidenceError: the nonces cannot be written.
    """
    is_told = not wanted.is_quiet and not wanted.as_json
    if is_told:
        print_bring_up(llm, sys.stderr, verbose=wanted.is_verbose)
    begun: list[Completion] = []

    def begin(completion: Completion) -> None:
        # Where evidence is written, what opens a record is kept before its request is run.
        begun.append(completion)
        if llm.evidence is not None:
            told = [(each.receipt, each.params) for each in begun if each.receipt is not None]
            write_nonces(nonces_path(llm.evidence), told)

    def tell(completion: Completion) -> None:
        if is_told:
            if sys.stdout.isatty():
                print(file=sys.stderr)
            print_line(completion, sys.stderr)
        if (cut := why_cut(llm, completion)) is not None:
            notices.say(cut)

    if wanted.prompt is None:
        typed = Typed(wanted.history_file)
        Chat(llm, params, typed, notices, begin, wanted.system).run(tell)
    else:
        completion = llm.start(_asked(llm, wanted, wanted.prompt), params)
        begin(completion)
        with notices.held():
            show(llm, completion, is_shown=not wanted.as_json)
        if wanted.as_json:
            print_json({**summary(completion), **llm.stats()})
            return
        tell(completion)
    if is_told and wanted.is_verbose and begun:
        print_tables(llm, sys.stderr)


def _asked(llm: LLM, wanted: Wanted, prompt: str) -> str | list[int]:
    if not wanted.is_chat:
        return prompt
    system = [] if wanted.system is None else [{"role": "system", "content": wanted.system}]
    return llm.chat_prompt([*system, {"role": "user", "content": prompt}])
