"""`tsqp-shm doctor`, `env`, `ps` and `clean`: what is wrong, and what is there."""

from __future__ import annotations

import argparse
from pathlib import Path

from tsqp_shm.cli.parser import Parser
from tsqp_shm.cli.settings import engine_config
from tsqp_shm.errors import ModelFileError
from tsqp_shm.roles.lifeline import Lifeline


def examine(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    from tsqp_shm.doctor.examination import report

    return report(_examined_model(arguments.model), engine_config(arguments), json_output=arguments.json)


def _examined_model(named: str | None) -> Path | None:
    from tsqp_shm.model_folder import find_model_folder

    try:
        return None if named is None else find_model_folder(named)
    except ModelFileError:
        # The report has a line for it, beside all others.
        return None if named is None else Path(named)


def print_environment(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    from tsqp_shm.doctor.environment import print_environment

    return print_environment(json_output=arguments.json)


def list_sessions(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    from tsqp_shm.sessions import print_sessions

    return print_sessions(json_output=arguments.json)


def clean(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    from tsqp_shm.sessions import clean_sessions

    return clean_sessions(dry_run=arguments.dry_run)


def examined_model_argument() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a Hugging Face folder whose need this machine is held against"
    )
    return parser


def dry_run_flag() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser
