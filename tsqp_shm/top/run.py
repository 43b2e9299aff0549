"""The view: a table on a terminal, or the same as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
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
from tsqp_shm.top.summary import Summary
from tsqp_shm.top.told import ask, tells

# Heartbeats are 0.1 s apart; a state is seen at most so late.
LOOK_INTERVAL_S = 0.05
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
    views = _views(session, interval_s)
    # In a pipe a line is not cut to the width of a terminal.
    console = Console(file=obeyed(sys.stdout), width=None if sys.stdout.isatty() else 160)
    if as_json:
        for facts in views:
            print_json(facts)
            if once:
                return 0
    elif once or not console.is_terminal:
        console.print(_table(next(views)))
        return 0
    else:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for facts in views:
                live.update(_table(facts), refresh=True)
    print(f"session {session!r} has ended", file=sys.stderr)
    return 0


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


def _views(session: str, interval_s: float) -> Iterator[dict[str, Any]]:
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
                    time.sleep(min(LOOK_INTERVAL_S, max(0.0, until - time.monotonic())))
                if tells(folder):
                    summary.hear(ask(folder))
                facts = summary.facts()
                # Without a GPU process there is no heartbeat: nobody waits for one.
                if facts["tee"].get("is_silent", True) and _is_dead(observer):
                    raise TsqpError(f"session {session!r} is dead: its TEE process is gone")
                yield facts
        finally:
            observer.close()
        again = _reopened(session)
        if again is None:
            return
        observer = again


def _observer(session: str) -> Observer:
    return Observer(session, PosixTransport(session))


def _reopened(session: str) -> Observer | None:
    """The arena that takes the place of one that is gone, where the GPU process is started anew."""
    deadline = time.monotonic() + RESTART_TIMEOUT_S
    while _is_alive(session) and time.monotonic() < deadline:
        try:
            return _observer(session)
        except ArenaNotReady:
            time.sleep(LOOK_INTERVAL_S)
    return None


def _is_alive(session: str) -> bool:
    return any(found.is_alive for found in list_sessions() if found.name == session)


def _is_dead(observer: Observer) -> bool:
    """Whether its TEE process is gone, and has not ended the session in order meanwhile."""
    return not _is_alive(observer.session) and not observer.is_gone


def _table(facts: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    totals, sequences = facts["totals"], facts["sequences"]
    generated, through = _number(facts["generated_per_s"]), _number(facts["tokens_per_s"])
    has_gpu = "gpu" in facts
    rows = [
        ("session", f"{facts['session']}, mode {facts['mode']}"),
        ("tokens/s", f"{generated} generated, {through} through the model"),
        *(_crossing(facts) if has_gpu else ()),
        ("sequences", f"{sequences['running']} of {sequences['of']} running, {sequences['waiting']} waiting"),
        ("totals", f"{totals['steps']:,} steps, {totals['generated']:,} tokens generated"
                   + (f", {totals['doorbells']:,} doorbells" if has_gpu else "")),
        *((("pads", _pads(facts["pads"])),) if "pads" in facts else ()),
        ("TEE", _side(facts["tee"])),
        *((("GPU", _side(facts["gpu"])),) if has_gpu else ()),
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


def _side(side: dict[str, Any]) -> str:
    doing = f"{side['doing']}, since {side['since_s']:.1f} s"
    if "is_silent" not in side:
        return doing
    age_s = side["heartbeat_age_s"]
    pulse = "none seen" if age_s is None else f"{age_s:.1f} s ago"
    return f"{doing}; heartbeat {pulse}{' (silent)' if side['is_silent'] else ''}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
