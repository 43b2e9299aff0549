"""A session that any thread may use: one thread of its own runs every step.

Callers hand orders in through a queue, which that thread takes between two steps, and are told of what comes of a
request through functions of their own that only hand over. So no caller's code, signal handler or finaliser ever runs
inside a step, a caller that is interrupted loses nothing of it, and callers share batches without a lock.

In a forked child there is no such thread: whatever it asks for is an error at once, and it leaves alone what is its
parent's.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import PeerDied, TsqpError
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.roles.process import peak_resident_bytes
from tsqp_shm.shm.session import Session
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.connection import Connection, StartGpu
from tsqp_shm.tee.engine import Chunk, Engine, NormWeights
from tsqp_shm.tee.ops import Float32
from tsqp_shm.tee.scheduler import Reservation, Scheduler
from tsqp_shm.tee.statistics import Statistics, TracedStatistics
from tsqp_shm.trace.recorder import Recorder

T = TypeVar("T")
CLOSED = "this LLM is closed"
# What this process itself has done wrong; every other signal is for the main thread.
FAULTS = {signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}


@dataclass(frozen=True)
class Update:
    """What a step has added to a completion.

    Attributes:
        token_ids, text: what is new of them.
        finish_reason: None while it goes on; see `Completion`.
        error: why it will not go on.
    """

    completion: Completion
    token_ids: Sequence[int] = ()
    text: str = ""
    finish_reason: str | None = None
    error: TsqpError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Load(NamedTuple):
    """What is in progress.

    Attributes:
        running, waiting: completions.
        free_sequences: caches that neither a completion nor a caller of `sequence` has.
        lent_slots: of slots, the runs of rows that are the GPU process's.
    """

    running: int
    waiting: int
    free_sequences: int
    lent_slots: int


# Called by the runtime's thread between two steps: puts the update where a caller waits for it, and nothing else.
Told = Callable[[Update], None]


@dataclass
class _Request:
    """Where a completion's updates go, and how much of it has been told."""

    told: Told
    num_tokens: int = 0
    num_characters: int = 0


class Runtime:
    """One model's session; use `Runtime.open`, then `start` its thread, or call `step`, and `close` at the end.

    Every method but `step` may be called by any thread.

    Attributes:
        statistics: what the session has done so far.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: EngineConfig,
        norms: NormWeights,
        statistics: Statistics,
        report: Callable[[str], None],
        connect: Callable[[], Connection],
        stack: ExitStack,
    ) -> None:
        self.statistics = statistics
        self._spec = spec
        self._config = config
        self._norms = norms
        self._report = report
        self._connect = connect
        self._stack = stack
        self._pid = os.getpid()
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._requests: dict[Completion, _Request] = {}
        self._thread: threading.Thread | None = None
        self._fault: TsqpError | None = None
        self._is_leaving = False
        self._has_ended = False
        self._leaving_by: BaseException | None = None
        self._end_error: Exception | None = None
        self._connection = connect()
        # Not the connection of this moment: a restart puts another in its place.
        stack.callback(lambda: self._connection.close())
        self._engine = self._new_engine()
        self._scheduler = Scheduler(self._engine, self._connection.arena.plan, statistics)
        _open.add(self)

    @classmethod
    def open(
        cls,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        config: EngineConfig,
        start_gpu: StartGpu | None,
        report: Callable[[str], None] = lambda line: None,
        recorder: Recorder | None = None,
        before: ExitStack | None = None,
    ) -> Runtime:
        """Begins a session and brings a GPU process up.

        Args:
            start_gpu: starts a GPU process for the session of that name; None: somebody else does.
            report: takes a line about what is waited for, and about each restart of the GPU process.
            recorder: takes what this process does and when; None: nothing does.
            before: what is to end after this session has; its own from here on.

        Raises:
            TsqpError: what kept it from coming up; nothing is left behind.
        """
        limits = config.limits(spec.max_position_embeddings, spec.layer_parameters)
        norms = NormWeights.load(spec, checkpoint)
        _native.set_num_threads(config.threads().tee)
        statistics = Statistics() if recorder is None else TracedStatistics(recorder)
        with ExitStack() as stack:
            if before is not None:
                stack.enter_context(before.pop_all())
            session = stack.enter_context(Session.begin(config.session))
            held: list[weakref.ref[Runtime]] = []

            def must_stop() -> bool:
                runtime = held[0]() if held else None
                return runtime is not None and runtime._is_leaving

            def connect() -> Connection:
                return Connection.open(
                    session, spec, config, limits, statistics, start_gpu, report, recorder, must_stop
                )

            runtime = cls(spec, config, norms, statistics, report, connect, stack)
            held.append(weakref.ref(runtime))
            runtime._stack = stack.pop_all()
        return runtime

    def start(self) -> None:
        """Starts the thread that runs the steps. It sleeps while there is nothing to do."""
        # Before the first request, and not at it: a finaliser, which may find none was made, must not start a thread.
        self._thread = threading.Thread(target=self._run, name="tsqp-shm runtime", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> TsqpError | None:
        """What has ended this session, closed ones included; None while it works.

        Returns:
            An error of the caller's own: one that is raised in two places would keep the frames of both.
        """
        if self._pid != os.getpid():
            return TsqpError(f"this LLM belongs to process {self._pid}; a forked child has to make its own")
        if self._fault is None:
            return TsqpError(CLOSED) if self._is_leaving else None
        return self._fault.again()

    def require_working(self) -> None:
        """Raises:
        TsqpError: what `fault` is.
        """
        fault = self.fault
        if fault is not None:
            raise fault

    def add(self, completions: Sequence[Completion], told: Told) -> None:
        """Has completions run, from the same step on.

        Args:
            told: takes an `Update` after each step that made a token of one, the last of which says how it ended.
        """
        self.require_working()

        def order() -> None:
            for completion in completions:
                self._requests[completion] = _Request(told)
                self._scheduler.add(completion)
            fault = self.fault
            if fault is not None:
                self._fail_requests(fault)

        self._order(order)

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Ends completions at the next step's beginning, those that have ended already aside; does not wait for it."""

        def order() -> None:
            for completion in completions:
                if self._requests.pop(completion, None) is not None:
                    self._scheduler.cancel(completion)
            self._tell_progress()

        self._order(order)

    @contextmanager
    def sequence(self) -> Iterator[int]:
        """A cache that no completion uses, for the block; waits its turn where there is none.

        Raises:
            TsqpError: the session is over, or ends meanwhile.
        """
        reservation = Reservation()
        try:
            self._ask(lambda: self._scheduler.reserve(reservation))
            while self._thread is None and not reservation.is_given:
                self.step()
            sequence = reservation.wait()
            if sequence is None:
                raise self.fault or TsqpError(CLOSED)
            yield sequence
        finally:
            # An order behind that of the reservation, however early the block was left.
            self._order(lambda: self._scheduler.give_back(reservation))

    def forward(self, sequence: int, token_ids: Sequence[int]) -> Float32:
        """The logits after every token of a sequence, between the steps of others.

        Shapes: [T, V] f32.

        Args:
            sequence: of `sequence()`.

        Raises:
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        most = self._connection.arena.plan.slot("tokens").num_rows

        def forward() -> Float32:
            rows = []
            for position in range(0, len(token_ids), most):
                chunk = token_ids[position : position + most]
                rows.append(self._engine.forward([Chunk(sequence, position, chunk, num_logits=len(chunk))]))
            return np.concatenate(rows)

        return self._ask(lambda: self._survive(forward))

    def step(self) -> bool:
        """Takes what was handed in, and runs one step in the calling thread: for who has not called `start`.

        Returns:
            Whether there is more to do.

        Raises:
            TsqpError: the thread has been started.
        """
        if self._thread is not None:
            raise TsqpError("the steps of this runtime are run by a thread of its own")
        self._take_orders(wait=False)
        if not self._scheduler.is_idle and self.fault is None:
            self._advance()
        return not self._scheduler.is_idle

    @property
    def connection(self) -> Connection:
        """To the GPU process of this moment; to be looked at, and used only by who runs the steps."""
        return self._connection

    def load(self) -> Load:
        """What is in progress between two steps, when whatever the last one left in flight has come back."""

        def load() -> Load:
            self._connection.queue.drain()
            running, waiting = self._scheduler.load
            return Load(running, waiting, self._scheduler.num_free_sequences, self._connection.slots.num_lent)

        return self._ask(load)

    def describe(self) -> dict[str, Any]:
        """Mode, processes, arena and doorbell of this session, as plain values."""
        return self._connection.describe()

    def facts(self) -> dict[str, Any]:
        """What `describe` says, and what the session has done so far. Units are in the names."""
        return self._ask(self._facts, even_if_over=True)

    def leave(self) -> None:
        """Has the thread close the session and does not wait for it: for finalisers, which may run at any moment."""
        if self._pid == os.getpid():
            self._is_leaving = True
            # SimpleQueue's put may interrupt another of the same thread, a lock may not.
            self._orders.put(lambda: None)

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
            self._leaving_by = by
        self.leave()
        if self._thread is None:
            self._end()
        elif self._thread is not threading.current_thread():
            self._thread.join()
        error, self._end_error = self._end_error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        # A signal that the kernel gave to this thread would not interrupt the main thread's wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - FAULTS)
        while not self._is_leaving:
            self._take_orders(wait=self._scheduler.is_idle)
            if not self._is_leaving and not self._scheduler.is_idle:
                self._advance()
        self._end()

    def _take_orders(self, *, wait: bool) -> None:
        with suppress(Empty):
            while True:
                self._orders.get(block=wait)()
                wait = False

    def _order(self, order: Callable[[], None]) -> None:
        if self._pid != os.getpid():
            return
        self._orders.put(order)
        # SYNC POINT: pairs with `_end`, which says so before it looks for orders a last time: one of both takes it.
        if self._has_ended:
            self._take_orders(wait=False)

    def _ask(self, act: Callable[[], T], *, even_if_over: bool = False) -> T:
        """Has the thread do it between two steps. Returns what it gives, or raises what it raises."""
        if not even_if_over or self._pid != os.getpid():
            self.require_working()
        if self._thread is None:
            self._take_orders(wait=False)
        if self._thread in (None, threading.current_thread()):
            return act()
        answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def order() -> None:
            try:
                if not even_if_over:
                    self.require_working()
                answer.put((act(), None))
            except BaseException as error:
                # The fault itself stays without a traceback, or it would keep the frames of whoever asked.
                answer.put((None, self.fault if error is self._fault else error))

        self._order(order)
        value, error = answer.get()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _advance(self) -> None:
        """One step, and what is to be told of it."""
        with suppress(Exception):
            # What it raises has ended the session, and every request has been told.
            self._survive(self._scheduler_step)
        for completion, request in list(self._requests.items()):
            token_ids, text = completion.token_ids[request.num_tokens :], completion.text[request.num_characters :]
            if token_ids or completion.finish_reason is not None:
                request.num_tokens += len(token_ids)
                request.num_characters += len(text)
                if completion.finish_reason is not None:
                    del self._requests[completion]
                request.told(Update(completion, token_ids, text, completion.finish_reason))

    def _scheduler_step(self) -> None:
        self._connection.progress.step_begins(*self._scheduler.load)
        self._scheduler.step()
        self._tell_progress()

    def _tell_progress(self) -> None:
        if self._fault is None and not self._has_ended:
            self._connection.progress.step_ends(*self._scheduler.load)

    def _survive(self, act: Callable[[], T]) -> T:
        """Does it again with another GPU process where one dies, as often as `restart_gpu` allows.

        Raises:
            TsqpError: the session is over.
        """
        while True:
            try:
                return act()
            except PeerDied as death:
                self._restart_gpu(death)
            except Exception as error:
                self._end_by(error)
                raise

    def _restart_gpu(self, death: PeerDied) -> None:
        """Puts another GPU process in the place of one that died; every completion goes on from the tokens it has."""
        died_s = time.monotonic()
        while True:
            if self.statistics.gpu_restarts >= self._config.restart_gpu:
                self._end_by(death)
                raise death
            self.statistics.gpu_restarts += 1
            self._say(f"{death}\nrestart {self.statistics.gpu_restarts} of {self._config.restart_gpu}")
            self._connection.abandon()
            waits = self._connection.doorbell.waits
            try:
                self._connection = self._connect()
                break
            except PeerDied as another:
                death = another
            except Exception as error:
                self._end_by(error)
                raise
        self._connection.doorbell.waits.update(waits)
        self._engine = self._new_engine()
        self._scheduler.start_over(self._engine)
        self._say(f"the gpu process is back after {time.monotonic() - died_s:.1f} s")

    def _new_engine(self) -> Engine:
        return Engine(self._spec, self._norms, self._connection.slots, self._connection.queue, self.statistics)

    def _say(self, line: str) -> None:
        # A caller's function that raises is that caller's affair and no fault of the session.
        with suppress(Exception):
            self._report(line)

    def _end_by(self, error: Exception) -> None:
        """The session is over; who waits for something of it is told."""
        if self._fault is None:
            if not isinstance(error, TsqpError):
                failed = TsqpError(f"a step failed: {type(error).__name__}: {error}")
                failed.__cause__ = error
                error = failed
            self._fault = error
            self._connection.mark_broken()
        self._fail_requests(self._fault)

    def _fail_requests(self, fault: TsqpError) -> None:
        requests, self._requests = self._requests, {}
        for completion, request in requests.items():
            self._scheduler.cancel(completion)
            request.told(Update(completion, error=fault.again()))
        self._scheduler.refuse_reservations()

    def _end(self) -> None:
        if self._has_ended:
            return
        self._fail_requests(self._fault or TsqpError(CLOSED))
        error = self._leaving_by
        try:
            self._stack.__exit__(type(error) if error else None, error, None)
        except Exception as failure:
            self._end_error = failure
        self._leaving_by = None
        self._has_ended = True
        self._take_orders(wait=False)

    def _facts(self) -> dict[str, Any]:
        facts = self._connection.describe()
        facts["processes"]["tee"]["peak_rss_bytes"] = peak_resident_bytes()
        peak = 0 if self.fault else self._survive(lambda: self._connection.gpu_peak_resident_bytes())
        facts["processes"]["gpu"]["peak_rss_bytes"] = peak
        statistics = self.statistics
        facts["doorbell"].update(
            rung=statistics.doorbells,
            round_trip_p50_us=statistics.round_trip_us(50),
            round_trip_p99_us=statistics.round_trip_us(99),
            waits=dict(self._connection.doorbell.waits),
            waiting_s=statistics.waiting_ns / 1e9,
        )
        facts["bytes"] = {
            "to_gpu": statistics.bytes_to_gpu,
            "to_tee": statistics.bytes_to_tee,
            # Every tensor crosses in its slot; a record is 64 bytes of numbers.
            "serialised": 0,
        }
        facts["operations"] = statistics.operations()
        return facts


# Those that nobody has closed at the interpreter's exit, where daemon threads still run and finalisers do not yet.
_open: weakref.WeakSet[Runtime] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for runtime in list(_open):
        with suppress(Exception):
            runtime.close()
