"""`tsqp-shm inspect`: a model before it is loaded."""

from __future__ import annotations

import argparse

from tsqp_shm.cli.flags import add_limits
from tsqp_shm.cli.parser import Parser
from tsqp_shm.cli.settings import blocked_interrupts, model_folder
from tsqp_shm.config import EngineConfig
from tsqp_shm.roles.lifeline import Lifeline

_SETTINGS = ("max_model_len", "max_num_seqs", "max_batch_tokens")


def inspect_model(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.inspection.report import inspect

    def config_of(mode: str) -> EngineConfig:
        given = {name: getattr(arguments, name) for name in _SETTINGS}
        return EngineConfig.from_environment({**given, "mode": mode})

    return inspect(
        model_folder(arguments),
        config_of,
        with_digest=arguments.digest,
        json_file=arguments.json_file,
        quiet=arguments.quiet,
    )


def inspection_flags() -> Parser:
    parser = Parser(add_help=False)
    add_limits(parser.add_argument_group("limits, on which memory depends"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--digest", action="store_true",
        help="also the SHA-256 of all that modes with int8 weights take of it; reads every weight",
    )  # fmt: skip
    output.add_argument("--json", dest="json_file", metavar="FILE", help="also write JSON; - for stdout and no table")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser
