"""`tsqp-shm trace`, and the flag by which the other verbs record one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tsqp_shm.cli.parser import Parser
from tsqp_shm.roles.lifeline import Lifeline


def trace_flag(of_one_role: bool) -> Parser:
    parser = Parser(add_help=False)
    text = (
        "record this process, for `tsqp-shm trace`" if of_one_role else "write a trace of both processes for Perfetto"
    )
    metavar = "FILE" if of_one_role else "FILE.json"
    group = parser.add_argument_group("trace")
    group.add_argument("--trace", type=Path, metavar=metavar, help=text)
    group.add_argument(
        "--trace-min-wait-us", type=int, default=0, metavar="N",
        help="leave waits out that are shorter; how many and how long, all in all, is in the trace (0)",
    )  # fmt: skip
    return parser


def trace_flags() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("file", type=Path, metavar="FILE.json", help="the trace to write; ui.perfetto.dev opens it")
    parser.add_argument(
        "recordings", type=Path, nargs="+", metavar="RECORDING", help="what `tee --trace` and `gpu --trace` wrote"
    )
    return parser


def make_trace(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    from tsqp_shm.errors import ConfigError, TraceError
    from tsqp_shm.trace.chrome import write_trace
    from tsqp_shm.trace.recorder import Recording

    recordings = [Recording.read(path) for path in arguments.recordings]
    if len({recording.role for recording in recordings}) < len(recordings):
        raise ConfigError("RECORDING", [str(path) for path in arguments.recordings], "one of each role at most")
    try:
        with arguments.file.open("w") as out:
            write_trace(recordings, out)
    except OSError as error:
        raise TraceError(arguments.file, f"cannot be written: {error.strerror}") from error
    for recording in recordings:
        dropped = f", and {recording.dropped:,} more that found no room" if recording.dropped else ""
        count = sum(left_out.num_waits for left_out in recording.left_out.values())
        left_out = f"; {count:,} waits of less than {recording.least_wait_ns / 1e3:g} us are left out" if count else ""
        print(f"{recording.role}: {len(recording.events):,} slices{dropped}{left_out}", file=sys.stderr)
    return 0
