"""The verbs: what each runs, and which flags it takes."""

from __future__ import annotations

from tsqp_shm._version import __version__
from tsqp_shm.cli.bench import add_cases
from tsqp_shm.cli.flags import (
    FIRST_FLAGS,
    arena_flags,
    common_flags,
    doorbell_flags,
    evidence_flags,
    gpu_flags,
    json_flag,
    model_argument,
    pad_flags,
    tee_flags,
    verbose_flag,
)
from tsqp_shm.cli.health import (
    clean,
    dry_run_flag,
    examine,
    examined_model_argument,
    list_sessions,
    print_environment,
)
from tsqp_shm.cli.inspection import inspect_model, inspection_flags
from tsqp_shm.cli.parser import Parser
from tsqp_shm.cli.replay import replay_flags, replay_request
from tsqp_shm.cli.roles import launch_both, play_gpu, play_tee
from tsqp_shm.cli.serve import serve_flags, serve_model
from tsqp_shm.cli.top import show_top, top_flags
from tsqp_shm.cli.traces import make_trace, trace_flag, trace_flags
from tsqp_shm.modes import MODES

LINES = "\n".join(mode.line for mode in MODES.values())
EPILOG = f"""{LINES}

exit codes: 0 well, 1 failed, 2 usage, 3 the other process died or broke the protocol, 4 it gave a false result, \
128+n ended by signal n.
Flags of session, GPU process, model, arena and doorbell may be set by environment too: --max-model-len is \
TSQP_SHM_MAX_MODEL_LEN; a flag wins over the environment. A flag that the mode does not take is refused, a variable \
passed over.
"""


def build_parser() -> Parser:
    parser = Parser(
        prog="tsqp-shm",
        description="Run an LLM split between a trusted process and an untrusted GPU process over shared memory.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"tsqp-shm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    shared = [model_argument(), common_flags()]
    examined = [examined_model_argument(), gpu_flags(), arena_flags(), pad_flags(), doorbell_flags(), json_flag()]
    tee, gpu, verbose = tee_flags(), gpu_flags(), verbose_flag()
    traced, recorded = trace_flag(False), trace_flag(True)
    for name, run, parents, text in (
        ("launch", launch_both, [*shared, tee, gpu, traced, verbose], "start a session and complete a prompt"),
        (
            "serve",
            serve_model,
            [*shared, gpu, arena_flags(), pad_flags(), doorbell_flags(), serve_flags(), evidence_flags()],
            "answer OpenAI's HTTP API; the process that does is the TEE process",
        ),
        (
            "tee",
            play_tee,
            [*shared, tee, recorded, verbose],
            "play the TEE role alone; a GPU process joins by --session",
        ),
        ("gpu", play_gpu, [*shared, gpu, recorded], "play the GPU role alone; a TEE process is joined by --session"),
        ("top", show_top, [top_flags()], "watch a running session"),
        ("trace", make_trace, [trace_flags()], "make a trace for Perfetto of what both roles recorded"),
        (
            "doctor",
            examine,
            examined,
            "check this machine, and say what is wrong and what to do; exit code 1 if it is bad",
        ),
        (
            "inspect",
            inspect_model,
            [model_argument(), inspection_flags()],
            "say what a model is, whether it is supported, and the memory that it takes in each mode; loads nothing",
        ),
        (
            "replay",
            replay_request,
            [replay_flags()],
            "compute a request of a session's evidence again, in the TEE process alone, and say what agrees; "
            "exit code 4 if the answer is another one, 1 if it is another request or there was nothing to compare; "
            "it prints params and answer, as it cannot know what its user has asked for and was answered",
        ),
        ("env", print_environment, [json_flag()], "print what a bug report should hold"),
        ("ps", list_sessions, [json_flag()], "list this user's sessions, live and dead"),
        ("clean", clean, [dry_run_flag()], "remove what dead sessions left"),
    ):
        verb = verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=EPILOG,
            parents=parents,
        )
        if name in FIRST_FLAGS:
            verb.put_first(FIRST_FLAGS[name])
        verb.set_defaults(run=run, prog=verb.prog)
    text = "measure it beside others, in turns"
    add_cases(verbs.add_parser("bench", help=text, description=text[0].upper() + text[1:] + "."))
    return parser
