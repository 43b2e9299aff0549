"""The supervisor: starts both roles as fresh processes and sees to it that nothing is left of them."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import PeerDied, PeerTimeout, TsqpError
from tsqp_shm.roles.process import RoleProcess
from tsqp_shm.shm.posix.folder import sweep_dead_sessions, swept_afterwards
from tsqp_shm.shm.posix.held_name import new_session_name

POLL_S = 0.05
# A role that dies takes the other with it; this is how long the other has to say why in its own words.
SECOND_DEATH_S = 2.0
# A fault that both roles see, such as a folder that is no model, the TEE process tells by itself within this time. It
# is shorter than it takes to miss a heartbeat: of the GPU process's end this process knows more.
SHARED_FAULT_S = 0.4


def launch(
    model: Path,
    config: EngineConfig,
    tee_arguments: Sequence[str],
    gpu_arguments: Sequence[str],
    verbose: bool,
    interactive: bool,
    report: Callable[[str], None] = lambda line: None,
    descriptors: Mapping[str, int] | None = None,
) -> int:
    """Runs one session: `tsqp-shm gpu` and `tsqp-shm tee`, as a user would in two terminals.

    The TEE process has this process's terminal; what the GPU process prints is kept for its last words.

    Args:
        tee_arguments: may hold prompts, and stand on no command line.
        interactive: Ctrl-C is for the TEE process alone, which has it from the terminal, and may go on after it.
        report: takes a line about each restart of the GPU process.
        descriptors: by role, of this process, what that role has too; None: nothing.

    Returns:
        The exit code: the TEE process's, or that of the role that died first.

    Raises:
        PeerDied: the GPU process died.
        PeerTimeout: a role did not become ready.
    """
    # A folder that cannot be used is then said once, and before any work.
    sweep_dead_sessions()
    session = config.session or new_session_name()

    tee: RoleProcess | None = None

    def say(text: str, otherwise: Callable[[str], None]) -> None:
        # The TEE process writes to the terminal from when it is up.
        for line in text.split("\n"):
            if tee is None or not tee.say(line):
                otherwise(line)

    def show(line: str) -> None:
        if verbose:
            say(line, lambda line: print(line, file=sys.stderr, flush=True))

    given = {role: [descriptor] for role, descriptor in (descriptors or {}).items()}
    with ExitStack() as stack:
        # Whatever a killed role could not remove itself; runs last.
        stack.enter_context(swept_afterwards())
        roles: list[RoleProcess] = []

        def keep(role: RoleProcess) -> RoleProcess:
            roles.append(role)
            stack.callback(role.stop)
            return role

        def start_gpu() -> RoleProcess:
            words = [str(model), "--session", session, *gpu_arguments]
            return keep(RoleProcess.start("gpu", words, descriptors=given.get("gpu", ()), listen=show))

        gpu = start_gpu()
        # The TEE process inherits this and unblocks when it can take Ctrl-C; a Python that has just begun would end in
        # a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        tee = keep(
            RoleProcess.start(
                "tee",
                [str(model), "--session", session],
                private_arguments=tee_arguments,
                descriptors=given.get("tee", ()),
                takes_input=interactive,
            )
        )
        stack.enter_context(_stopped_together(roles))
        if interactive:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            return _supervise(tee, gpu, start_gpu, config, lambda text: say(text, report))
        except KeyboardInterrupt:
            # In a terminal the TEE process got its own; a signal sent to this process alone is passed on.
            tee.send(signal.SIGINT)
            tee.wait(SECOND_DEATH_S)
            raise


def _supervise(
    tee: RoleProcess,
    gpu: RoleProcess,
    start_gpu: Callable[[], RoleProcess],
    config: EngineConfig,
    report: Callable[[str], None],
) -> int:
    started = time.monotonic()
    restarts = 0
    told_of = -1
    while True:
        tee_code = tee.wait(POLL_S)
        if tee_code is not None:
            return _end_of_tee(tee, tee_code, gpu)
        if restarts < min(tee.gpus_wanted, config.restart_gpu):
            # It may only be believed dead.
            gpu.kill()
            restarts += 1
            report(f"{gpu.death()}\nrestart {restarts} of {config.restart_gpu}")
            gpu = start_gpu()
            started = time.monotonic()
        if tee.is_ready:
            gpu.came_up()
        error = gpu.death()
        if error is not None:
            may_restart = restarts < config.restart_gpu and tee.is_ready and isinstance(error, PeerDied)
            if not may_restart or gpu.exit_code == 0:
                return _end_of_gpu(tee, gpu, restarts, error)
            # It asks for another as soon as it needs one.
            if told_of < restarts:
                tee.tell_of_dead_gpu(restarts)
                told_of = restarts
        elif time.monotonic() - started > config.timeout_s:
            for role in (gpu, tee):
                if not role.is_ready:
                    raise PeerTimeout(f"the {role.role} process to become ready", "", config.timeout_s, None)


@contextmanager
def _stopped_together(roles: Sequence[RoleProcess]) -> Iterator[None]:
    """Has Ctrl-Z stop the whole session, and all of it go on again.

    The GPU process is not of the terminal's group, and a side that goes on alone takes the other's silence for a death.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for role in roles:
            role.send(signal.SIGSTOP)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        # Stopped here, until SIGCONT.
        signal.signal(number, stop)
        for role in roles:
            role.send(signal.SIGCONT)

    # What is ignored stays so.
    numbers = [
        number
        for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _end_of_tee(tee: RoleProcess, code: int, gpu: RoleProcess) -> int:
    if code < 0:
        death = tee.death()
        raise death if death is not None else PeerDied("tee", f"signal {-code}")
    if code == PeerDied.exit_code:
        # It has said that its peer is gone, but only this process knows why.
        gpu.wait(SECOND_DEATH_S)
        death = gpu.death()
        if death is not None and gpu.exit_code != 0:
            raise death
    return code


def _end_of_gpu(tee: RoleProcess, gpu: RoleProcess, number: int, error: TsqpError) -> int:
    if gpu.exit_code == 0:
        patience_s = SECOND_DEATH_S
    else:
        patience_s = POLL_S if tee.is_ready else SHARED_FAULT_S
    code = tee.wait(patience_s)
    if code is not None and gpu.exit_code == 0:
        return _end_of_tee(tee, code, gpu)
    if code is not None and code >= 0 and code != PeerDied.exit_code:
        return code
    # It would miss the heartbeat first, when it is told to end.
    tee.tell_of_dead_gpu(number)
    raise error
