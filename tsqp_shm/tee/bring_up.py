"""How a session is brought up in each mode: what it takes of the weights, then a name, then a connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig, Limits
from tsqp_shm.errors import ConfigError, LimitError
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.modes import MODES
from tsqp_shm.shm.transport import Register, Transport
from tsqp_shm.tee.alone import Alone
from tsqp_shm.tee.anchor import Anchor
from tsqp_shm.tee.connection import Connect
from tsqp_shm.tee.gpu_connection import GpuConnection, StartGpu
from tsqp_shm.tee.modes import ALONE_ENGINES, ENGINES, Loading
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.trace.recorder import Recorder

# A step has hundreds of short kernels, and a worker that sleeps between two would miss most of them: this is longer
# than what Python does there. Longer still helps nobody, and loses more where a third process wants the core.
ALONE_PATIENCE_US = 200

# Takes the session's name, whose end it lays on the stack, and gives what connects it.
Begin = Callable[[ExitStack], Connect]


def prepare(
    network: Network,
    checkpoint: Checkpoint,
    anchor: Anchor,
    transcript: Transcript | None,
    config: EngineConfig,
    limits: Limits,
    transport: Transport | Register,
    start_gpu: StartGpu | None,
    report: Callable[[str], None],
    recorder: Recorder | None,
    statistics: Statistics,
    must_stop: Callable[[], bool],
) -> Begin:
    """Takes of the weights what the mode wants; nothing of the session is there yet.

    Args:
        anchor: takes the digest of what is loaded.
        transcript: takes the products that are computed elsewhere; None: nobody asks for them.
        transport: and what follows, as of `Runtime`.
        must_stop: asked now and then in the middle of a step; True ends it, and with it the session.

    Raises:
        ModelFileError: the checkpoint lacks what is wanted, or is not the model that is pinned.
        ConfigError: the transport is of another kind than the mode needs.
        LimitError: the weights do not fit in memory.
    """
    mode, threads = MODES[limits.mode], config.threads().tee
    digest = anchor.begin()
    if isinstance(transport, Register):
        if mode.has_gpu_process:
            raise ConfigError("transport", transport, f"what joins two sides, as mode {mode.name} has a GPU process")
        # Before the weights are loaded: they are quantised by all of them.
        _native.set_num_threads(threads, ALONE_PATIENCE_US)
        with _told_of_memory():
            make_alone = ALONE_ENGINES[mode.name](network, checkpoint, digest)
        anchor.hold(digest)

        def begin_alone(stack: ExitStack) -> Connect:
            registration = transport.register()
            stack.callback(registration.end)

            def connect(look: Callable[[], None], timeout_s: float) -> Alone:
                with _told_of_memory():
                    return Alone(registration, network, limits, statistics, make_alone, recorder, must_stop, look)

            return connect

        return begin_alone
    if not mode.has_gpu_process:
        raise ConfigError("transport", transport, f"none, as mode {mode.name} has no GPU process")
    # Nobody else computes yet: what has to be quantised is by all threads that there will be.
    _native.set_num_threads(max(config.threads()))
    with _told_of_memory():
        loaded = ENGINES[mode.name](Loading(network, checkpoint, config, limits, digest, transcript))
    anchor.hold(digest)
    _native.set_num_threads(threads)

    def begin(stack: ExitStack) -> Connect:
        session = transport.begin()
        stack.callback(session.end)
        with _told_of_memory():
            loaded.begin(session.name, stack)

        def connect(look: Callable[[], None], timeout_s: float) -> GpuConnection:
            connection = GpuConnection.open(
                session, network, config, limits, statistics, loaded, start_gpu, report, recorder, must_stop, look,
                timeout_s,
            )  # fmt: skip
            try:
                loaded.wait_until_ready(report, connection.queue.look)
            except BaseException:
                connection.close()
                raise
            return connection

        return connect

    return begin


@contextmanager
def _told_of_memory() -> Iterator[None]:
    """Raises:
    LimitError: the system grants no more memory.
    """
    try:
        yield
    except MemoryError:
        advice = "see tsqp-shm inspect, and lower --max-model-len, --max-num-seqs or --max-batch-tokens"
        raise LimitError("memory", f"the system grants no more; {advice}") from None
