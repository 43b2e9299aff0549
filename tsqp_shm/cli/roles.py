"""`tsqp-shm launch`, and the two roles that it starts as commands of their own: `tee` and `gpu`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn

from tsqp_shm.cli.flags import common_flags, tee_flags, verbose_flag
from tsqp_shm.cli.settings import (
    answer_params,
    blocked_interrupts,
    engine_config,
    given,
    model_folder,
    prompt_text,
    reporter,
    require_sane,
    wanted,
)
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import ConfigError, ModelFileError, PeerDied
from tsqp_shm.modes import MODES
from tsqp_shm.roles.lifeline import Lifeline, ParentsGpu
from tsqp_shm.roles.resources import require_resources

PARENT_SPEAKS_FIRST_S = 2.0


def launch_both(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    with blocked_interrupts():
        from tsqp_shm.roles.launch import launch
        from tsqp_shm.trace.file import TraceFile
        from tsqp_shm.trace.recorder import require_least_wait

        config = engine_config(arguments)
        require_sane(arguments)
    require_least_wait(arguments.trace, arguments.trace_min_wait_us)
    if not MODES[config.mode].has_gpu_process:
        return _complete_alone(arguments, config)
    require_resources(sum(config.threads()))
    _keep_to_itself(config)
    if not arguments.interactive:
        # Here, where the descriptors are that a path may name, and before there is a GPU process that could look on.
        arguments.prompt, arguments.prompt_file = prompt_text(arguments), None
    roles = {"tee": given(arguments, common_flags(), tee_flags(), verbose_flag()), "gpu": config.gpu_arguments()}
    if arguments.quiet:
        roles["gpu"].append("--quiet")
    report = reporter(arguments)
    descriptors = {}
    with ExitStack() as stack:
        if arguments.trace is not None:
            trace = stack.enter_context(TraceFile(arguments.trace, tuple(roles), report, arguments.trace_min_wait_us))
            for role, words in roles.items():
                words += trace.arguments(role)
                descriptors[role] = trace.descriptor(role)
        code = launch(
            model_folder(arguments),
            config,
            roles["tee"],
            roles["gpu"],
            arguments.verbose,
            arguments.interactive,
            report,
            descriptors,
        )
        if code:
            # A role has said why; that there is little to trace then is not to be said in its place.
            raise SystemExit(code)
    return 0


def _complete_alone(arguments: argparse.Namespace, config: EngineConfig) -> int:
    """What `launch` does where there is no other process: this one needs no supervisor."""
    with blocked_interrupts():
        from tsqp_shm.console.notices import Notices
        from tsqp_shm.console.run import run_prompts
        from tsqp_shm.llm import LLM
        from tsqp_shm.progress import Progress

        signal.signal(signal.SIGINT, _interrupt_once)
    # Before the model, whose weights take longest.
    task = wanted(arguments)
    notices = Notices(sys.stderr, is_quiet=arguments.quiet, shares_line=sys.stdout.isatty())
    model = model_folder(arguments)
    with Progress(arguments.quiet) as progress:
        # All weights become integers now, which takes seconds for large models.
        progress.show(f"loading {model.name}")
        llm = LLM(
            model,
            report=notices.say,
            trace=arguments.trace,
            trace_min_wait_us=arguments.trace_min_wait_us,
            evidence=arguments.evidence,
            transcript=arguments.transcript,
            config=config,
        )
    with llm:
        run_prompts(llm, answer_params(arguments, llm), task, notices)
    return 0


def play_tee(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    config = engine_config(arguments)
    _require_two_roles(config)
    _keep_to_itself(config)
    with blocked_interrupts():
        from tsqp_shm.console.notices import Notices
        from tsqp_shm.console.run import run_prompts
        from tsqp_shm.llm import LLM
        from tsqp_shm.progress import Progress

        signal.signal(signal.SIGINT, _interrupt_once)

    require_sane(arguments)
    task = wanted(arguments)
    notices = Notices(sys.stderr, is_quiet=arguments.quiet, shares_line=sys.stdout.isatty())
    try:
        start_gpu = ParentsGpu(lifeline).start if lifeline.has_parent else False
        model = model_folder(arguments)
        # Whom it waits for is gone from the terminal when he has come; it stays where nobody else starts him.
        passes = lifeline.has_parent and not arguments.verbose
        with Progress(arguments.quiet or not passes) as progress:
            progress.show(f"loading {model.name}")
            llm = LLM(
                model,
                start_gpu=start_gpu,
                report=progress.show if passes else notices.say,
                trace=arguments.trace,
                trace_min_wait_us=arguments.trace_min_wait_us,
                evidence=arguments.evidence,
                transcript=arguments.transcript,
                config=config,
            )
        with llm:
            # What its parent would say in the middle of an answer is said between two lines.
            lifeline.listen(notices.say)
            lifeline.ready()
            run_prompts(llm, answer_params(arguments, llm), task, notices)
    except PeerDied:
        if lifeline.has_parent:
            # The parent of both sees why the GPU process died, where this process sees only its silence: it ends
            # this process and says so, if that process does end.
            time.sleep(PARENT_SPEAKS_FIRST_S)
        raise
    return 0


def play_gpu(arguments: argparse.Namespace, lifeline: Lifeline) -> int:
    # The waits of OpenMP's threads after a parallel region would steal the cores that the TEE process needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    config = engine_config(arguments)
    _require_two_roles(config)
    model = model_folder(arguments)
    if config.session is None:
        raise ConfigError("session", None, "--session NAME, the name the TEE process uses")
    # Before torch is loaded, which starts threads itself.
    require_resources(config.threads().gpu)
    # A parent's thread that has signals blocked may have started this process.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Nothing is held yet, and a handler would wait until torch has loaded.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        from tsqp_shm.gpu.worker import serve, use_threads
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModelFileError("torch", "the GPU process needs it: pip install torch") from None
    from tsqp_shm.shm.posix.folder import swept_afterwards
    from tsqp_shm.shm.posix.transport import PosixTransport
    from tsqp_shm.trace.recorder import recording

    signal.signal(signal.SIGTERM, handler)
    # Ctrl-C in a shared terminal is for the TEE process, which then stops this one.
    with swept_afterwards(), recording(arguments.trace, "gpu", arguments.trace_min_wait_us) as recorder:
        use_threads(config.threads().gpu)
        serve(model, PosixTransport(config.session), config, reporter(arguments), lifeline.ready, recorder)
    return 0


def _keep_to_itself(config: EngineConfig) -> None:
    """A process that has the prompt, where the GPU process is to learn nothing of it and runs as the same user."""
    if MODES[config.mode].has_pads:
        from tsqp_shm.hardening import harden

        harden()


def _require_two_roles(config: EngineConfig) -> None:
    if not MODES[config.mode].has_gpu_process:
        split = " or ".join(mode.name for mode in MODES.values() if mode.has_gpu_process)
        raise ConfigError(
            "mode", config.mode, f"{split}; tsqp-shm launch runs this one, as it has no roles to play apart"
        )


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    # In a terminal Ctrl-C comes twice, from the terminal and from the parent; the second must not disturb the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
