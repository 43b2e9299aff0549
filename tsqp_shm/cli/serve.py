"""`tsqp-shm serve`: flags, the config file, and the start."""

from __future__ import annotations

import argparse
import os
import resource
from dataclasses import fields
from pathlib import Path
from typing import Any

from tsqp_shm.cli.parser import Parser
from tsqp_shm.cli.settings import blocked_interrupts, engine_config, model_folder, reporter
from tsqp_shm.errors import ConfigError, ModelFileError
from tsqp_shm.modes import MODES
from tsqp_shm.roles.lifeline import Lifeline

API_KEY_VARIABLE = "TSQP_SHM_API_KEY"


def serve_flags() -> Parser:
    parser = Parser(add_help=False)
    group = parser.add_argument_group("server")
    group.add_argument("--host", metavar="NAME", help="address to listen on (127.0.0.1)")
    group.add_argument("--port", type=int, metavar="N", help="port to listen on; 0 takes a free one (8000)")
    group.add_argument("--uds", metavar="PATH", help="listen on a Unix socket of mode 0600 instead")
    group.add_argument(
        "--api-key", dest="api_keys", action="append", metavar="KEY",
        help=f"who names it is served; may be repeated; or {API_KEY_VARIABLE} (everybody who can connect)",
    )  # fmt: skip
    group.add_argument("--served-model-name", metavar="NAME", help="what clients call the model (its folder's name)")
    group.add_argument("--ssl-certfile", metavar="FILE", help="certificate; TLS ends in the TEE process")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its key")
    group.add_argument(
        "--allowed-origins", action="append", metavar="ORIGIN",
        help="of pages that may call from a browser; may be repeated (none but the server's own)",
    )  # fmt: skip
    group.add_argument("--max-queue", type=int, metavar="N", help="completions that may wait; more get 429 (256)")
    group.add_argument(
        "--drain-s", type=float, metavar="S", help="how long running requests have to end after SIGTERM (30)"
    )
    group.add_argument(
        "--receive-s", type=float, metavar="S",
        help="how long a client may take to send a request, and to take a piece of an answer (20)",
    )  # fmt: skip
    group.add_argument("--max-connections", type=int, metavar="N", help="open at once (1024)")
    group.add_argument("--max-body-bytes", type=int, metavar="N", help="of one request (8 MiB)")
    group.add_argument(
        "--on-integrity", metavar="exit|lock",
        help="after a false result: end with exit code 4, or stay and answer nothing but that (exit)",
    )  # fmt: skip
    group.add_argument("--config", type=Path, metavar="FILE.yaml", help="flags as `name: value` lines; flags win")
    return parser


def serve_model(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    """Runs the server in this process, which is the TEE role."""
    if arguments.config is not None:
        from tsqp_shm.cli.config_file import apply_config

        apply_config(arguments.config, arguments)
    config = engine_config(arguments)
    if MODES[config.mode].has_pads:
        from tsqp_shm.hardening import harden

        harden()
    with blocked_interrupts():
        try:
            from tsqp_shm.serve.run import serve
        except ModuleNotFoundError as error:
            if error.name not in ("starlette", "uvicorn", "h11", "prometheus_client", "anyio"):
                raise
            reason = "the server needs it: pip install '.[serve]' in a clone of tsqp-shm"
            raise ModelFileError(str(error.name), reason) from None
        from tsqp_shm.llm import LLM
        from tsqp_shm.serve.settings import ServeSettings

    settings = ServeSettings(**_settings(arguments, [field.name for field in fields(ServeSettings)]))
    for name in ("ssl_certfile", "ssl_keyfile"):
        file = getattr(settings, name)
        if file is not None and not os.access(file, os.R_OK):
            raise ConfigError(name.replace("_", "-"), file, "a file that can be read")
    # A connection is a file descriptor.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, settings.max_connections + 512)), hard))
    model, report = model_folder(arguments), reporter(arguments)

    # Each answer's record can be asked for, whether it is written or not.
    evidence = arguments.evidence or (MODES[config.mode].arithmetic is not None)

    def load() -> LLM:
        return LLM(model, report=report, evidence=evidence, config=config)

    def ready(llm: LLM) -> None:
        report(MODES[config.mode].line)
        report(f"{settings.served_model_name or model.name} is ready")

    serve(load, config, settings.served_model_name or model.name, settings, report, ready)
    return 0


def _settings(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    given = {name: getattr(arguments, name, None) for name in names}
    keys = list(given["api_keys"] or []) or [key for key in os.environ.get(API_KEY_VARIABLE, "").split(",") if key]
    if any("\n" in key for key in keys):
        raise ConfigError("api-key", "one with a line end", "keys on one line")
    several = {"api_keys": tuple(keys) or None, "allowed_origins": tuple(given["allowed_origins"] or ()) or None}
    return {name: value for name, value in {**given, **several}.items() if value is not None}
