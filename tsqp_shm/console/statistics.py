"""What a completion took, in one line; and what a session has done, in tables."""

from __future__ import annotations

from typing import Any, TextIO

from tsqp_shm.llm import LLM
from tsqp_shm.tee.completion import Completion


def summary(completion: Completion) -> dict[str, Any]:
    """What one completion gave and how long it took. Units: seconds."""
    first = completion.first_token_s or completion.started_s
    prefill_s = first - completion.started_s
    decode_s = (completion.ended_s or first) - first
    computed = len(completion.prompt_token_ids) - completion.num_cached_tokens
    decoded = len(completion.token_ids) - 1
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
        "prompt_tokens": len(completion.prompt_token_ids),
        "cached_tokens": completion.num_cached_tokens,
        "completion_tokens": len(completion.token_ids),
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": computed / prefill_s if prefill_s > 0 else None,
        "decode_s": decode_s,
        "decode_tokens_per_s": decoded / decode_s if decode_s > 0 else None,
        "time_to_first_token_s": prefill_s,
    }


def print_line(completion: Completion, out: TextIO) -> None:
    """One line of a completion that has ended; why, where it was cut, `why_cut` says."""
    facts = summary(completion)
    prompt, cached = facts["prompt_tokens"], facts["cached_tokens"]
    tokens = f"{prompt:,} tokens" if not cached else f"{prompt - cached:,} of {prompt:,} tokens"
    print(
        f"prefill {tokens} in {facts['prefill_s']:.3g} s{_rate(facts['prefill_tokens_per_s'])}, "
        f"decode {facts['completion_tokens']:,} in {facts['decode_s']:.3g} s{_rate(facts['decode_tokens_per_s'])}",
        file=out,
        flush=True,
    )


def print_tables(llm: LLM, out: TextIO) -> None:
    """What the session has done: operations of each side, what has crossed, memory."""
    stats = llm.stats()
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
    print(f"peak memory: {peaks}{' (arena included)' if 'arena' in stats else ''}", file=out, flush=True)


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
    if not tokens_per_s:
        return ""
    return f" ({tokens_per_s:,.0f}/s)" if tokens_per_s >= 10 else f" ({tokens_per_s:.1f}/s)"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} us"
