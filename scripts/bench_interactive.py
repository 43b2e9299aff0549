#!/usr/bin/env python3
"""What people wait for who talk to one session: a stream's next token while somebody else's prompt is computed, and the
first token of a conversation's next turn.

    scripts/bench_interactive.py streams                                  # four streams, and a prompt of 2,000 tokens
    scripts/bench_interactive.py streams --budgets 0,128,256 --modes plain,tee-only
    scripts/bench_interactive.py turns --modes plain,verified,blinded,tee-only

streams: each mode and prefill budget is a process of its own, asleep (SIGSTOP) but in its turn. In a turn so many
streams decode, and a prompt arrives. Inter-token times are those between that prompt's arrival and its first token;
p50 is of the streams alone, before it arrives. A step of the budget is one of so many tokens with nobody beside them,
the last ones of such a prompt, which see all keys; the prompt alone is that of all tokens with nobody beside it. Budget
0 is none: as few steps as it fits.

turns: five turns of a conversation, greedy, with its cache kept and without, in turns. Blinded keeps none unless it is
asked to, and is here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from script_flags import ScriptParser, positive
from turns import Contender, play

QUESTIONS = (
    "Name a river in Europe.",
    "How long is it, and where does it begin?",
    "Which cities lie on it?",
    "Tell me about the first of these.",
    "And what do people eat there?",
)


def play_streams(settings: dict[str, Any]) -> Any:
    """Once it is asked: seconds, of what its names say."""
    import numpy as np

    from tsqp_shm import LLM, SamplingParams
    from tsqp_shm.tee.caches import Keeper

    count, tokens = settings["streams"], settings["tokens"]
    llm = LLM(
        settings["model"],
        mode=settings["mode"],
        prefill_budget=settings["budget"],
        prefix_reuse=True,
        max_model_len=tokens + 512,
        max_num_seqs=count + 1,
    )
    numbers = np.random.default_rng(0)
    endless = SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True, detokenize=False)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

    def prompt(length: int) -> list[int]:
        ids: list[int] = numbers.integers(0, llm.spec.vocab_size, length).tolist()
        return ids

    def last_step_s(num_new: int) -> float:
        """Of so many tokens, when those before them lie in the cache."""
        keeper, whole = Keeper(), prompt(tokens)
        for length in (tokens - num_new, tokens) if num_new < tokens else (tokens,):
            completion = llm.start(whole[:length], one)
            completion.keeper = keeper
            before = time.perf_counter()
            for _ in llm.stream_completion(completion):
                pass
        llm.runtime.close_keeper(keeper)
        return time.perf_counter() - before

    def beside_streams() -> dict[str, Any]:
        came: list[list[float]] = [[] for _ in range(count)]
        all_decode = threading.Semaphore(0)

        def told(index: int, update: Any) -> None:
            if update.token_ids:
                came[index].append(time.perf_counter())
                if len(came[index]) == settings["before"]:
                    all_decode.release()

        streams = [llm.start(prompt(16), endless) for _ in range(count)]
        for index, stream in enumerate(streams):
            llm.runtime.add([stream], lambda update, index=index: told(index, update))
        for _ in range(count):
            all_decode.acquire()
        arrived = time.perf_counter()
        llm.generate(prompt(tokens), one, use_tqdm=False)
        ended = time.perf_counter()
        llm.runtime.cancel(streams)
        alone, beside = [], []
        for times in came:
            for earlier, later in itertools.pairwise(times):
                if later < arrived:
                    alone.append(later - earlier)
                elif earlier < ended:
                    beside.append(later - earlier)
        return {"p50": statistics.median(alone), "max": max(beside), "first token": ended - arrived}

    def answer(order: Any) -> dict[str, float]:
        found = beside_streams()
        found["step of the budget"] = last_step_s(settings["budget"] or tokens)
        found["prompt alone"] = last_step_s(tokens)
        return found

    return answer


def play_turns(settings: dict[str, Any]) -> Any:
    """Once it is asked: seconds to the first token of each turn, and how many tokens its prompt had and were found."""
    from tsqp_shm import LLM, SamplingParams

    llm = LLM(
        settings["model"], mode=settings["mode"], prefix_reuse=settings["reuse"], max_model_len=1024, max_num_seqs=2
    )
    params = SamplingParams(temperature=0, max_tokens=settings["new_tokens"])

    def answer(order: Any) -> list[list[float]]:
        found, messages = [], []
        with llm.conversation() as conversation:
            for question in QUESTIONS:
                messages.append({"role": "user", "content": question})
                said = conversation.chat(messages, params)
                messages.append({"role": "assistant", "content": said.outputs[0].text})
                found.append([said.prefill_s, len(said.prompt_token_ids), said.num_cached_tokens])
        return found

    return answer


PLAYS = {"streams": play_streams, "turns": play_turns}


def in_turns(case: str, kinds: dict[str, dict[str, Any]], rounds: int) -> dict[str, list[Any]]:
    """What each contender answers in each round, the first of which does not count."""
    found: dict[str, list[Any]] = {name: [] for name in kinds}
    with ExitStack() as stack:
        contenders = [
            stack.enter_context(closing(Contender(name, sys.executable, __file__, case, settings)))
            for name, settings in kinds.items()
        ]
        for number in range(rounds + 1):
            for contender in contenders:
                given = contender.turn(None)
                if number:
                    found[contender.name].append(given)
    return found


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def print_streams(found: dict[str, list[Any]], arguments: argparse.Namespace) -> None:
    from tsqp_shm.bench.tables import print_columns, say

    say(f"{arguments.streams} streams, and a prompt of {arguments.tokens:,} tokens arrives; milliseconds, medians of "
        f"{arguments.rounds} rounds")  # fmt: skip
    names = ["p50", "max", "step of the budget", "first token", "prompt alone"]
    rows = []
    for name, rounds in found.items():
        medians = [statistics.median(each[column] for each in rounds) for column in names]
        p50, most, step = medians[:3]
        rows.append([name, *map(milliseconds, medians), f"{(most - step) / p50:.2f}"])
    print_columns(["mode, budget", *names, "(max - step) / p50"], rows)


def print_turns(found: dict[str, list[Any]], arguments: argparse.Namespace) -> None:
    from tsqp_shm.bench.tables import print_columns, say

    say(f"milliseconds to the first token of each turn, answers of at most {arguments.new_tokens} tokens, medians of "
        f"{arguments.rounds} rounds; below them the tokens of the prompt, and how many were found")  # fmt: skip
    rows = []
    for name, rounds in found.items():
        by_turn = list(zip(*rounds, strict=True))
        rows.append([name, *(milliseconds(statistics.median(each[0] for each in turn)) for turn in by_turn)])
        rows.append(["", *(f"{turn[0][1]}, {turn[0][2]}" for turn in by_turn)])
    print_columns(["mode", *(f"turn {number + 1}" for number in range(len(QUESTIONS)))], rows)


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("case", nargs="?", choices=list(PLAYS), default="streams", help="what is measured (streams)")
    parser.add_argument("--model", metavar="MODEL", help="a folder (the demo model)")
    parser.add_argument("--modes", default="plain", metavar="MODE,...", help="with commas between (plain)")
    parser.add_argument("--budgets", default="0,64,128,256,512", metavar="N,...", help="of streams (0,64,128,256,512)")
    parser.add_argument("--streams", type=positive, default=4, metavar="N", help="that decode (4)")
    parser.add_argument("--tokens", type=positive, default=2000, metavar="N", help="of the prompt (2000)")
    parser.add_argument("--before", type=positive, default=40, metavar="N", help="tokens of each stream before it (40)")
    parser.add_argument("--new-tokens", type=positive, default=48, metavar="N", help="most of an answer of a turn (48)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="turns of each that count (5)")
    parser.add_argument("--json", metavar="FILE", help="what was found, as JSON too")
    parser.add_argument("--play", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        play(PLAYS[arguments.play[0]](json.loads(arguments.play[1])))
        return 0
    if arguments.model is None:
        from tsqp_shm.demo.model import demo_model_folder

        arguments.model = str(demo_model_folder())
    common = {name: getattr(arguments, name) for name in ("model", "streams", "tokens", "before", "new_tokens")}
    kinds = {}
    for mode in arguments.modes.split(","):
        if arguments.case == "streams":
            for budget in map(int, arguments.budgets.split(",")):
                kinds[f"{mode}, {budget or 'none'}"] = {**common, "mode": mode, "budget": budget}
        else:
            for reuse, words in ((False, "computed whole"), (True, "cache kept")):
                kinds[f"{mode}, {words}"] = {**common, "mode": mode, "reuse": reuse}
    found = in_turns(arguments.case, kinds, arguments.rounds)
    (print_streams if arguments.case == "streams" else print_turns)(found, arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
