"""The view: a table on a terminal, or the same as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tsqp_shm.errors import ArenaNotReady, ConfigError, TsqpError
from tsqp_shm.printable import obeyed, print_json, shown
from tsqp_shm.shm.observer import Observer
from tsqp_shm.shm.posix.folder import list_sessions, sessions_folder
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.top.keys import Keys
from tsqp_shm.top.summary import Summary
from tsqp_shm.top.told import ask, tells

# Often enough for shares of two seconds to a few hundredths.
LOOK_INTERVAL_S = 0.02
# Of what a side was at lately, so many operations are named; and where lines are shorter than this, one.
MOST_OPERATIONS = 3
NARROW_COLUMNS = 60
RESTART_TIMEOUT_S = 30.0


def watch(session: str | None, interval_s: float, *, once: bool, as_json: bool) -> int:
    """Shows a session until it ends; on a terminal in place, elsewhere or with `once` a single time.

    Args:
        session: None: the one that runs.
        interval_s: between two views; the first comes after so long.

    Raises:
        ConfigError: several run, and none was named.
        TsqpError: none runs, or that one does not.
    """
    session = _chosen(session)
    # In a pipe a line is not cut to the width of a terminal.
    console = Console(file=obeyed(sys.stdout), width=None if sys.stdout.isatty() else 160)
    if as_json:
        for facts in _views(session, interval_s, _sleep):
            print_json(facts)
            if once:
                return 0
    elif once or not console.is_terminal:
        console.print(_table(next(_views(session, interval_s, _sleep)), console.width))
        return 0
    else:
        # The keys first: what is typed while the screen is put back must not be shown on it.
        with Keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
            for facts in _views(session, interval_s, keys.wait):
                live.update(_table(facts, console.width, "; q leaves"), refresh=True)
        if keys.has_left:
            return 0
    print(f"session {session!r} has ended", file=sys.stderr)
    return 0


def _sleep(timeout_s: float) -> bool:
    time.sleep(timeout_s)
    return False


def _chosen(session: str | None) -> str:
    sessions = {found.name: found.is_alive for found in list_sessions()}
    alive = [name for name, is_alive in sessions.items() if is_alive]
    if session is not None:
        if session in alive:
            return session
        if session in sessions:
            raise TsqpError(
                f"session {session!r} is dead: its TEE process is gone; the next start removes what it left"
            )
        raise TsqpError(f"there is no session {session!r}; {_running(alive)}")
    if len(alive) > 1:
        raise ConfigError("session", None, f"one of {', '.join(alive)}: several are running")
    if not alive:
        raise TsqpError(_running(alive))
    return alive[0]


def _running(alive: list[str]) -> str:
    return f"running: {', '.join(alive)}" if alive else "no session is running; tsqp-shm launch starts one"


def _views(session: str, interval_s: float, wait: Callable[[float], bool]) -> Iterator[dict[str, Any]]:
    """Looks at it until it has ended, or `wait` says that nobody wants to see more."""
    observer = _observer(session)
    folder = sessions_folder() / session
    while True:
        try:
            summary = Summary(observer)
            while not observer.is_gone:
                until = time.monotonic() + interval_s
                while True:
                    summary.take(observer.look())
                    if time.monotonic() >= until:
                        break
                    if wait(min(LOOK_INTERVAL_S, max(0.0, until - time.monotonic()))):
                        return
                if tells(folder):
                    summary.hear(ask(folder))
                facts = summary.facts()
                # Without a GPU process there is no heartbeat: nobody waits for one.
                if facts["tee"].get("is_silent", True) and _is_dead(observer):
                    raise TsqpError(f"session {session!r} is dead: its TEE process is gone")
                yield facts
        finally:
            observer.close()
        again = _reopened(session, wait)
        if again is None:
            return
        observer = again


def _observer(session: str) -> Observer:
    return Observer(session, PosixTransport(session))


def _reopened(session: str, wait: Callable[[float], bool]) -> Observer | None:
    """The arena that takes the place of one that is gone, where the GPU process is started anew."""
    deadline = time.monotonic() + RESTART_TIMEOUT_S
    while _is_alive(session) and time.monotonic() < deadline:
        try:
            return _observer(session)
        except ArenaNotReady:
            if wait(LOOK_INTERVAL_S):
                break
    return None


def _is_alive(session: str) -> bool:
    return any(found.is_alive for found in list_sessions() if found.name == session)


def _is_dead(observer: Observer) -> bool:
    """Whether its TEE process is gone, and has not ended the session in order meanwhile."""
    return not _is_alive(observer.session) and not observer.is_gone


def _table(facts: dict[str, Any], columns: int, hint: str = "") -> Table:
    table = Table.grid(padding=(0, 2))
    totals, sequences = facts["totals"], facts["sequences"]
    generated, through = _number(facts["generated_per_s"]), _number(facts["tokens_per_s"])
    has_gpu = "gpu" in facts
    most = MOST_OPERATIONS if columns >= NARROW_COLUMNS else 1
    rows = [
        ("session", f"{facts['session']}, mode {facts['mode']}{hint}"),
        ("tokens/s", f"{generated} generated, {through} through the model"),
        *(_crossing(facts) if has_gpu else ()),
        ("sequences", f"{sequences['running']} of {sequences['of']} running, {sequences['waiting']} waiting"),
        ("totals", f"{totals['steps']:,} steps, {totals['generated']:,} tokens generated"
                   + (f", {totals['doorbells']:,} doorbells" if has_gpu else "")),
        *((("pads", _pads(facts["pads"])),) if "pads" in facts else ()),
        *_side("TEE", facts["tee"], most),
        *(_side("GPU", facts["gpu"], most) if has_gpu else ()),
    ]  # fmt: skip
    for name, value in rows:
        table.add_row(f"{name:>11}", Text(shown(value, lines=False)))
    return table


def _crossing(facts: dict[str, Any]) -> list[tuple[str, str]]:
    slots = facts["slots"]
    lent = f": {', '.join(slots['in_use'])}" if slots["in_use"] else ""
    return [
        ("doorbells/s", f"{_number(facts['doorbells_per_s'])}, {facts['doorbell']}"),
        ("round trip", f"p50 {_number(facts['round_trip_p50_us'])} us, p99 {_number(facts['round_trip_p99_us'])} us"),
        ("slots", f"{len(slots['in_use'])} of {slots['of']} handed over{lent}"),
    ]


def _pads(pads: dict[str, Any] | None) -> str:
    if pads is None:
        return "the session does not tell"
    fault = f"; no more are made: {pads['fault']}" if pads["fault"] else ""
    return (
        f"{pads['stock_rows']:,} of {pads['capacity_rows']:,} rows in stock, {_number(pads['pads_per_s'])} pads/s; "
        f"{pads['used']:,} used, {pads['burned']:,} burned, {pads['tee_products']:,} products in the TEE{fault}"
    )


def _side(name: str, side: dict[str, Any], most: int) -> Iterator[tuple[str, str]]:
    doing = side["doing"]
    if side["since_s"] >= 1:
        doing += f", since {side['since_s']:.1f} s"
    if "is_silent" in side:
        age_s = side["heartbeat_age_s"]
        pulse = "none seen" if age_s is None else f"{age_s:.1f} s ago"
        doing += f"; heartbeat {pulse}{' (silent)' if side['is_silent'] else ''}"
    yield name, doing
    if len(side["lately"]) > 1:
        yield "lately", "; ".join(_lately(side["lately"], most))


def _lately(kinds: list[dict[str, Any]], most: int) -> Iterator[str]:
    """Of each that it did, all in all and by operation; the largest first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds:
        groups.setdefault(kind["doing"], []).append(kind)
    sums = {doing: sum(kind["share"] for kind in group) for doing, group in groups.items()}
    for doing, share in sorted(sums.items(), key=lambda each: -each[1]):
        named = [f"{kind['operation']} {kind['share']:.0%}" for kind in groups[doing] if kind["operation"]]
        more = ["..."] if len(named) > most else []
        yield f"{share:.0%} {doing} {', '.join([*named[:most], *more])}".rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
