"""What a person sees: the bring-up report, the completion as it is made, the statistics table."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any, TextIO

from tsqp_shm.errors import RequestError
from tsqp_shm.llm import LLM
from tsqp_shm.modes import MODES
from tsqp_shm.printable import is_text, print_json
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.receipts import nonces_path, write_nonces
from tsqp_shm.tee.sampling_params import SamplingParams


def run_prompts(
    llm: LLM,
    params: SamplingParams,
    prompt: str,
    *,
    chat: bool,
    interactive: bool,
    json_output: bool,
    quiet: bool,
) -> None:
    """Completes one prompt, or asks for them turn by turn, and prints what was asked for.

    The completion goes to stdout, everything else to stderr.
    """
    if not quiet and not json_output:
        print_bring_up(llm, sys.stderr)
    if interactive:
        completions = _converse(llm, params)
    else:
        asked = llm.chat_prompt([{"role": "user", "content": prompt}]) if chat else prompt
        completions = [_start(llm, asked, params, [])]
        _run(llm, completions[0], shown=not json_output)
    if json_output:
        print_json({**summary(completions[0]), **llm.stats()})
    elif not quiet and completions:
        print_statistics(llm, completions, sys.stderr)


def _start(llm: LLM, asked: str | list[int], params: SamplingParams, earlier: Sequence[Completion]) -> Completion:
    """A completion to be run. Where evidence is written, what opens its records is kept, before it runs.

    Raises:
        RequestError: as `LLM.start`.
        EvidenceError: the file cannot be written.
    """
    completion = llm.start(asked, params)
    if llm.evidence is not None:
        told = [(each.receipt, each.params) for each in (*earlier, completion) if each.receipt is not None]
        write_nonces(nonces_path(llm.evidence), told)
    return completion


def _run(llm: LLM, completion: Completion, *, shown: bool) -> None:
    for piece in llm.stream_completion(completion):
        if shown:
            print(piece, end="", flush=True)
    if shown:
        print(flush=True)


def _converse(llm: LLM, params: SamplingParams) -> list[Completion]:
    """Reads prompts until the end of input; the conversation so far goes into each turn.

    Ctrl-C cancels the answer in progress, and what was shown of it stays in the conversation.
    """
    messages: list[dict[str, str]] = []
    completions: list[Completion] = []
    while (line := _ask()) is not None:
        content = line.removeprefix("\ufeff") if not completions else line
        if not content.strip():
            continue
        if not is_text(content):
            print("this line is no UTF-8 text, and was not asked", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": content})
        try:
            completions.append(_start(llm, llm.chat_prompt(messages), params, completions))
        except RequestError as error:
            # The conversation has outgrown the model: begin a new one, and say so.
            print(f"{error}; starting over", file=sys.stderr)
            messages.clear()
            continue
        messages.append({"role": "assistant", "content": _answer(llm, completions[-1])})
    return completions


def _ask() -> str | None:
    """The next line that is typed; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _answer(llm: LLM, completion: Completion) -> str:
    """Shows an answer while it is made, until its end or Ctrl-C, however often that comes. Returns what was shown."""
    shown = ""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with closing(llm.stream_completion(completion)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                shown += piece
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, previous)
    print(flush=True)
    return shown


def summary(completion: Completion) -> dict[str, Any]:
    """What one completion gave and how long it took. Units: seconds."""
    first = completion.first_token_s or completion.started_s
    prefill_s = first - completion.started_s
    decode_s = (completion.ended_s or first) - first
    decoded = len(completion.token_ids) - 1
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
        "prompt_tokens": len(completion.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": len(completion.prompt_token_ids) / prefill_s if prefill_s > 0 else None,
        "decode_s": decode_s,
        "decode_tokens_per_s": decoded / decode_s if decode_s > 0 else None,
        "time_to_first_token_s": prefill_s,
    }


def print_bring_up(llm: LLM, out: TextIO) -> None:
    facts = llm.bring_up()
    mode = MODES[facts["mode"]]
    rows = [("mode", f"{mode.name}: {mode.protects}")]
    if mode.has_gpu_process:
        # In one of them the GPU process sees less than in this one.
        others = "; ".join(f"--mode {other.name}: {other.summary}" for other in MODES.values() if other is not mode)
        rows.append(("others", others))
    rows += [("model", facts["model"]), ("weights", _weights_words(facts["weights"]))]
    rows += _rows_of_two(facts) if mode.has_gpu_process else _rows_of_one(facts)
    rows.append(("limits", f"{llm.max_model_len} tokens a sequence, {llm.config.max_num_seqs} sequences"))
    for name, value in rows:
        print(f"{name:>10}  {value}", file=out)
    print(file=out, flush=True)


def _weights_words(weights: dict[str, Any]) -> str:
    digest = weights["model_digest"]
    if weights["is_pinned"]:
        return f"pinned by {digest}"
    return "as found, not pinned" if digest is None else f"as found, not pinned: {digest}"


def _rows_of_two(facts: dict[str, Any]) -> list[tuple[str, str]]:
    arena, doorbell, processes = facts["arena"], facts["doorbell"], facts["processes"]
    locked = "locked" if arena["locked"] else f"not locked ({arena['locked_reason']})"
    return [
        ("device", f"{facts['device']}, {facts['arithmetic']}, slots {facts['transfer']}"),
        ("processes", f"tee {processes['tee']['pid']}, gpu {processes['gpu']['pid']}"),
        ("arena", f"{arena['name']}, {arena['bytes']:,} bytes, {arena['slots']} slots"),
        ("pages", f"{arena['pages']:,} of 4 KiB, all backed and mapped, {locked}"),
        ("doorbell", f"{doorbell['mode']}, {doorbell['endpoint']}"),
        *([("checks", _checks(facts["checks"]))] if "checks" in facts else []),
        *(_pads(facts["pads"]) if "pads" in facts else []),
    ]


def _checks(checks: dict[str, Any]) -> str:
    """What the TEE process keeps of the model's Linears."""
    weights = "the Linears' weights beside them" if checks["has_weights"] else "no Linear's weights"
    return f"{checks['vectors']} secret vectors a Linear, {checks['bytes']:,} bytes here, and {weights}"


_WITHOUT_PADS = {
    "tee": "what has none is computed here",
    "wait": "what has none waits for one",
    "refuse": "what has none is refused",
}


def _pads(pads: dict[str, Any]) -> list[tuple[str, str]]:
    threads, rows = pads["threads"], pads["capacity_rows"]
    makers = f"{threads} thread{'s' * (threads != 1)} at idle"
    locked = "locked" if pads["locked"] else "not locked"
    return [
        (
            "pads",
            f"stock of {rows:,} rows, {pads['bytes']:,} bytes, {locked}; maker {pads['maker']}, {makers}; "
            f"{_WITHOUT_PADS[pads['out']]}, prefill {pads['prefill']}",
        ),
        (
            "keys",
            f"key {pads['key_id'][:16]}, locked; no core dumps, and no other process of this user can begin to look in",
        ),
        *([("locked", _locks(pads["locks"]))] if pads["locks"] else []),
    ]


def _locks(locks: dict[str, Any]) -> str:
    kinds = ", ".join(kind for kind, is_locked in locks.items() if is_locked is True)
    return f"{kinds}; {locks['reason']}" if locks["reason"] else kinds


def _rows_of_one(facts: dict[str, Any]) -> list[tuple[str, str]]:
    threads = facts["threads"]
    return [
        ("device", f"the CPU, {facts['arithmetic']}, {threads} thread{'s' * (threads > 1)}"),
        ("process", f"tee {facts['processes']['tee']['pid']}, session {facts['session']}"),
        ("slots", f"{facts['slots_bytes']:,} bytes of private memory"),
    ]


def print_statistics(llm: LLM, completions: list[Completion], out: TextIO) -> None:
    stats = llm.stats()
    print(file=out)
    for completion in completions:
        facts = summary(completion)
        print(
            f"prefill {facts['prompt_tokens']} tokens in {facts['prefill_s']:.3f} s "
            f"({_rate(facts['prefill_tokens_per_s'])}), "
            f"decode {facts['completion_tokens'] - 1} tokens in {facts['decode_s']:.3f} s "
            f"({_rate(facts['decode_tokens_per_s'])}), ended by {facts['finish_reason']}",
            file=out,
        )
    print(f"\n{'side':<5}{'operation':<10}{'calls':>8}{'total s':>10}{'mean us':>11}{'share':>8}", file=out)
    for row in stats["operations"]:
        print(
            f"{row['side']:<5}{row['operation']:<10}{row['calls']:>8}{row['total_s']:>10.3f}"
            f"{row['mean_us']:>11.1f}{row['share']:>8.1%}",
            file=out,
        )
    if "doorbell" in stats:
        _print_what_crossed(stats, out)
    peaks = ", ".join(
        f"{role} {facts['peak_rss_bytes'] / 2**20:,.0f} MiB" for role, facts in stats["processes"].items()
    )
    print(f"peak memory: {peaks}{' (arena included)' if 'arena' in stats else ''}", file=out)


def _print_what_crossed(stats: dict[str, Any], out: TextIO) -> None:
    doorbell, moved = stats["doorbell"], stats["bytes"]
    print(
        f"\ndoorbells rung {doorbell['rung']:,}, round trip p50 {_us(doorbell['round_trip_p50_us'])}, "
        f"p99 {_us(doorbell['round_trip_p99_us'])}, waited {doorbell['waiting_s']:.3f} s",
        file=out,
    )
    if pads := stats.get("pads"):
        print(
            f"pads used {pads['used']:,}, burned {pads['burned']:,}, made {pads['made']:,} ({pads['made_per_s']:,}/s); "
            f"stock {pads['stock_rows']:,} of {pads['capacity_rows']:,} rows; rows of products computed in the TEE "
            f"{pads['tee_products']:,}",
            file=out,
        )
    print(
        f"bytes in slots: to the GPU process {moved['to_gpu']:,}, to the TEE {moved['to_tee']:,}; "
        f"serialised {moved['serialised']}",
        file=out,
    )
    if restarts := stats["processes"]["gpu"]["restarts"]:
        print(f"GPU process restarted {restarts} time{'s' * (restarts > 1)}", file=out)


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:,.1f} tokens/s"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} us"
