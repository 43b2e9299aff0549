"""`tsqp-shm top`."""

from __future__ import annotations

import argparse

from tsqp_shm.cli.parser import Parser
from tsqp_shm.config import require_session_name
from tsqp_shm.errors import ConfigError
from tsqp_shm.roles.lifeline import Lifeline

LONGEST_INTERVAL_S = 3600


def top_flags() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("session", nargs="?", metavar="SESSION", help="needed where several are running")
    parser.add_argument("--once", action="store_true", help="one view, and end")
    parser.add_argument("--json", action="store_true", help="each view as one JSON object a line")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="between two views (1)")
    return parser


def show_top(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    if not 0.1 <= arguments.interval <= LONGEST_INTERVAL_S:
        raise ConfigError("interval", arguments.interval, f"seconds, 0.1 to {LONGEST_INTERVAL_S}")
    if arguments.session is not None:
        require_session_name(arguments.session)
    try:
        from tsqp_shm.top.run import watch
    except ModuleNotFoundError as error:
        if error.name != "rich":
            raise
        raise ConfigError("top", "no rich", "the package it draws with: pip install rich") from None
    return watch(arguments.session, arguments.interval, once=arguments.once, as_json=arguments.json)
