"""A session that any thread may use: one thread of its own runs every step.

Callers hand orders in through a queue, which that thread takes between two steps, and are told of what comes of a
request through functions of theirs that only hand over. So no caller's code and no signal handler runs inside a step, a
caller that is interrupted loses nothing of it, and callers share batches without a lock. What Python's collector
finalises there may ask for nothing that has to be waited for: it gets an error.

In a forked child there is no such thread: whatever it asks for is an error at once, and what is its parent's it leaves
alone.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import RequestError, TsqpError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.transport import Transport
from tsqp_shm.tee.completion import Completion, checked_token_ids
from tsqp_shm.tee.connection import Connection, StartGpu
from tsqp_shm.tee.modes import ENGINES
from tsqp_shm.tee.ops import Float32
from tsqp_shm.tee.orders import Orders
from tsqp_shm.tee.scheduler import Reservation
from tsqp_shm.tee.statistics import Statistics, TracedStatistics
from tsqp_shm.tee.stepper import Load, Stepper
from tsqp_shm.tee.updates import Told
from tsqp_shm.trace.recorder import Recorder

T = TypeVar("T")
CLOSED = "this LLM is closed"
# What this process itself has done wrong; every other signal is for the main thread.
FAULTS = {signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}


class Runtime:
    """One model's session; use `Runtime.open`, then `start` its thread or call `step`, and `close` at the end.

    Every method but `step` may be called by any thread.

    Attributes:
        statistics: what the session has done so far.
    """

    def __init__(
        self, statistics: Statistics, stack: ExitStack, make_stepper: Callable[[Callable[[], bool]], Stepper]
    ) -> None:
        self.statistics = statistics
        self._pid = os.getpid()
        self._orders = Orders()
        self._thread: threading.Thread | None = None
        self._is_leaving = False
        self._is_over = threading.Event()
        self._closed_by: BaseException | None = None
        self._error_at_end: Exception | None = None
        self._reserved: set[int] = set()
        self._stepper = make_stepper(lambda: self._is_leaving)
        self._limits = self._stepper.connection.arena.plan.limits
        self._stack = stack
        _open.add(self)

    @classmethod
    def open(
        cls,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        config: EngineConfig,
        transport: Transport,
        start_gpu: StartGpu | None,
        report: Callable[[str], None] = lambda line: None,
        recorder: Recorder | None = None,
        before: ExitStack | None = None,
    ) -> Runtime:
        """Begins a session and brings a GPU process up.

        Args:
            transport: what joins the two sides.
            start_gpu: starts a GPU process for the session; None: somebody else does.
            report: takes a line about what is waited for, and about each restart of the GPU process.
            recorder: takes what this process does and when; None: nothing does.
            before: what is to end after this session has; its own from here on.

        Raises:
            TsqpError: what kept it from coming up; nothing is left behind.
        """
        network = Network.of(spec)
        limits = config.limits(spec.max_position_embeddings, network.layer_parameters)
        make_engine = ENGINES[limits.mode](network, checkpoint)
        _native.set_num_threads(config.threads().tee)
        statistics = Statistics() if recorder is None else TracedStatistics(recorder)
        with ExitStack() as stack:
            if before is not None:
                stack.enter_context(before.pop_all())
            session = transport.begin()
            stack.callback(session.end)

            def make_stepper(must_stop: Callable[[], bool]) -> Stepper:
                def connect() -> Connection:
                    return Connection.open(
                        session, network, config, limits, statistics, start_gpu, report, recorder, must_stop
                    )

                stepper = Stepper(make_engine, statistics, connect, config.restart_gpu, report)
                # Not the connection of this moment: a restart puts another in its place.
                stack.callback(lambda: stepper.connection.close())
                return stepper

            runtime = cls(statistics, stack, make_stepper)
            runtime._stack = stack.pop_all()
        return runtime

    def start(self) -> None:
        """Starts the thread that runs the steps; it sleeps while there is nothing to do."""
        # Before the first request, and not at it: a finaliser, which may find that none was made, starts no thread.
        self._thread = threading.Thread(target=self._run, name="tsqp-shm runtime", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> TsqpError | None:
        """What has ended this session, being closed included; None while it works. An error of the caller's own."""
        if self._pid != os.getpid():
            return TsqpError(f"this LLM belongs to process {self._pid}; a forked child has to make its own")
        if self._stepper.fault is not None:
            return self._stepper.fault.again()
        return TsqpError(CLOSED) if self._is_leaving else None

    def require_working(self) -> None:
        """Raises:
        TsqpError: what `fault` is.
        """
        fault = self.fault
        if fault is not None:
            try:
                raise fault
            finally:
                # Or this frame and the error would keep each other, and the frames of whoever asked.
                del fault

    def require_can_wait(self) -> None:
        """Raises:
        TsqpError: this is the runtime's own thread, on which a caller's function or a finaliser asks for something that
            this very thread would have to do.
        """
        if self._thread is threading.current_thread():
            raise TsqpError("asked by the thread that runs the steps; hand over to another thread, and ask there")

    @property
    def connection(self) -> Connection:
        """To the GPU process of this moment; to be looked at, and used only by who runs the steps."""
        return self._stepper.connection

    def add(self, completions: Sequence[Completion], told: Told) -> None:
        """Has completions run, from the same step on.

        Args:
            told: takes an `Update` after each step that made a token of one, the last of which says how it ended.

        Raises:
            TsqpError: the session is over; where it ends after this, the updates say so.
        """
        self.require_working()
        taken = list(completions)
        for completion in taken:
            self._checked(completion.prompt_token_ids, self._limits.max_model_len - 1)
            completion.begin()

        def order() -> None:
            self._stepper.add(taken, told)
            fault = self.fault
            if fault is not None:
                self._stepper.end(fault)

        self._order(order)

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Ends completions before the next step; does not wait for it. Those that have ended are left as they are."""
        taken = list(completions)
        self._order(lambda: self._stepper.cancel(taken))

    @contextmanager
    def sequence(self) -> Iterator[int]:
        """A cache that no completion uses, for the block; waits its turn where there is none.

        Raises:
            TsqpError: the session is over, or ends meanwhile.
        """
        self.require_can_wait()
        reservation = Reservation(self._give_back)
        try:
            self._ask(lambda: self._stepper.reserve(reservation))
            while self._thread is None and not reservation.is_given:
                self.step()
            sequence = reservation.wait()
            if sequence is None:
                raise self.fault or TsqpError(CLOSED)
            self._reserved.add(sequence)
            yield sequence
        finally:
            self._give_back(reservation)

    def _give_back(self, reservation: Reservation) -> None:
        if reservation.sequence is not None:
            self._reserved.discard(reservation.sequence)
        self._order(lambda: self._stepper.give_back(reservation))

    def forward(self, sequence: int, token_ids: Sequence[int]) -> Float32:
        """The logits after every token of a sequence, computed between the steps of others.

        Shapes: [T, V] f32.

        Args:
            sequence: of `sequence()`.

        Raises:
            RequestError: it is not, or there are no tokens, too many, or one outside the vocabulary.
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        if sequence not in self._reserved:
            raise RequestError("sequence", sequence, "one that `sequence()` has given")
        ids = self._checked(token_ids, self._limits.max_model_len)
        return self._ask(lambda: self._stepper.forward(sequence, ids))

    def _checked(self, token_ids: Sequence[int], most: int) -> list[int]:
        vocab_size = self._stepper.connection.arena.plan.geometry.vocab_size
        return checked_token_ids(token_ids, most, self._limits.max_model_len, vocab_size)

    def step(self) -> bool:
        """Takes what was handed in, and runs one step in the calling thread: for who has not called `start`.

        Returns:
            Whether there is more to do.

        Raises:
            TsqpError: the thread has been started.
        """
        if self._thread is not None:
            raise TsqpError("the steps of this runtime are run by a thread of its own")
        self._orders.take()
        if not self._stepper.is_idle and self.fault is None:
            self._stepper.step()
        return not self._stepper.is_idle

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left of the session, here at least: a forked child has none of it."""
        return self._is_over.is_set() or self._pid != os.getpid()

    def load(self) -> Load:
        """What is in progress between two steps."""
        return self._ask(self._stepper.load)

    def describe(self) -> dict[str, Any]:
        """Mode, processes, arena and doorbell of this session, as plain values."""
        if self._pid != os.getpid():
            self.require_working()
        return self._stepper.connection.describe()

    def facts(self) -> dict[str, Any]:
        """What `describe` says, and what the session has done so far, when it is over too. Units are in the names."""
        return self._ask(self._stepper.facts, even_if_over=True)

    def leave(self) -> None:
        """Has the thread close the session and does not wait for it: for finalisers, which may run at any moment."""
        if self._pid == os.getpid():
            self._is_leaving = True
            # Wakes it.
            self._orders.give(lambda: None)

    def close(self, by: BaseException | None = None) -> None:
        """Stops the GPU process and removes the arena; requests in progress end with an error. Closing twice does
        nothing, nor does closing what is a parent's.

        Args:
            by: the exception because of which it is closed.

        Raises:
            TraceError: the trace that was asked for cannot be made.
        """
        if self._pid != os.getpid():
            return
        if not self._is_leaving:
            self._closed_by = by
        self.leave()
        if self._thread is None:
            self._end()
        elif self._thread is not threading.current_thread():
            # Not by joining: a join that is interrupted takes the thread for ended.
            self._is_over.wait()
        error, self._error_at_end = self._error_at_end, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    def _run(self) -> None:
        try:
            # A signal that the kernel gave to this thread would not interrupt the main thread's wait.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - FAULTS)
            while not self._is_leaving:
                if self._stepper.is_idle:
                    self._orders.take(wait=True, timeout_s=self._stepper.patience_s)
                    self._stepper.expire()
                else:
                    self._orders.take()
                    self._stepper.step()
        except BaseException as error:
            # None is expected; whoever waits must not do so for ever.
            self._stepper.end(TsqpError(f"the thread that runs the steps has failed: {type(error).__name__}: {error}"))
        finally:
            self._end()

    def _order(self, order: Callable[[], None]) -> None:
        if self._pid == os.getpid():
            self._orders.give(order)

    def _ask(self, act: Callable[[], T], *, even_if_over: bool = False) -> T:
        """Has the thread do it between two steps. Returns what it gives, or raises what it raises."""
        if not even_if_over or self._pid != os.getpid():
            self.require_working()
        self.require_can_wait()
        if self._thread is None:
            self._orders.take()
            return act()

        def checked() -> T:
            if not even_if_over:
                self.require_working()
            return act()

        return self._orders.ask(checked)

    def _end(self) -> None:
        if self._is_over.is_set():
            return
        error, self._closed_by = self._closed_by, None
        try:
            self._stepper.end(TsqpError(CLOSED))
            self._stack.__exit__(type(error) if error else None, error, None)
        except Exception as failure:
            self._error_at_end = failure
        finally:
            self._orders.end()
            self._is_over.set()


# Those that nobody has closed at the interpreter's exit, when threads still run and finalisers do not yet.
_open: weakref.WeakSet[Runtime] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    left = [runtime for runtime in _open if not runtime.has_ended]
    if not left:
        return
    # A thread that came back to an interpreter that is no more would end the process by an abort, and a GPU process
    # that nobody stopped would stay: whatever signal comes now, the end is waited for.
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, signal.SIG_IGN)
    for runtime in left:
        with suppress(Exception):
            runtime.close()
    # Hooks that were registered before this one are the program's, and find its handlers.
    for number, handler in ours.items():
        signal.signal(number, handler)
