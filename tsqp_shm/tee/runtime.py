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
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, TypeVar

from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import IntegrityError, RequestError, TsqpError
from tsqp_shm.metrics import Metric
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.transport import Register, Transport
from tsqp_shm.tee.anchor import Anchor
from tsqp_shm.tee.bring_up import prepare
from tsqp_shm.tee.caches import Keeper
from tsqp_shm.tee.completion import Completion, checked_token_ids
from tsqp_shm.tee.connection import CLOSED, Connection
from tsqp_shm.tee.gpu_connection import StartGpu
from tsqp_shm.tee.ops import Float32
from tsqp_shm.tee.orders import Ending, Orders
from tsqp_shm.tee.scheduler import Reservation
from tsqp_shm.tee.statistics import Statistics, TracedStatistics
from tsqp_shm.tee.stepper import Load, Stepper
from tsqp_shm.tee.updates import Told, Update
from tsqp_shm.tee.witness import Witness
from tsqp_shm.trace.recorder import Recorder

T = TypeVar("T")
_UNROUNDED = "none, as prompts look as long as the next multiple of pad_prompt_to, and a row for each token would not"
# What this process itself has done wrong; every other signal is for the main thread.
FAULTS = {signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}


class Runtime:
    """One model's session; `start` it, or `open` it and call `step`, and `close` it at the end.

    Every method but `step` may be called by any thread.

    Args:
        transport: what joins the two sides; in a mode without a GPU process where the session is known by its name.
        start_gpu: starts a GPU process for the session; None: somebody else does.
        report: takes a line about what is waited for, and about each restart of the GPU process.
        recorder: takes what this process does and when; None: nothing does.
        before: what is to end after this session has; its own from here on.
        files: by which the model's small files were read; None: nobody has read any.
        witness: writes down what comes of requests; None: nobody does.

    Attributes:
        statistics: what the session has done so far.

    Raises:
        ModelFileError: the checkpoint lacks what this process wants of it, or is not the model that is pinned.
        ConfigError: the transport is of another kind than the mode needs.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        config: EngineConfig,
        transport: Transport | Register,
        start_gpu: StartGpu | None,
        report: Callable[[str], None] = lambda line: None,
        recorder: Recorder | None = None,
        before: ExitStack | None = None,
        files: ModelFiles | None = None,
        witness: Witness | None = None,
    ) -> None:
        network = Network.of(spec)
        self._limits = limits = config.limits(spec.max_positions, network.layer_parameters)
        # Sizes are the config's word until the weights bear them out.
        checkpoint.require(network.tensors())
        self.statistics = statistics = Statistics() if recorder is None else TracedStatistics(recorder)
        witness = witness or Witness()
        self._anchor = anchor = Anchor(
            files or ModelFiles(checkpoint.folder), config.model_digest, is_asked=witness.has_evidence
        )
        begin = prepare(
            network, checkpoint, anchor, witness.transcript, config, limits, transport, start_gpu, report, recorder,
            statistics, lambda: self._is_leaving,
        )  # fmt: skip
        self._vocab_size = spec.vocab_size
        self._pad_prompt_to = config.pad_prompt_to
        self._scheduling = {"prefill_budget": config.prefill_budget, "prefix_reuse": config.reuses_prefixes}
        self._pid = os.getpid()
        self._ending = Ending()
        self._orders = Orders(self._ending)
        self._thread: threading.Thread | None = None
        self._has_begun = False
        self._is_leaving = False
        self._closed_by: BaseException | None = None
        # Whether somebody waits for the end, who is told what goes wrong at it.
        self._is_awaited = False
        self._error_at_begin: BaseException | None = None
        self._error_at_end: Exception | None = None
        self._reserved: set[int] = set()
        self._stack = before.pop_all() if before is not None else ExitStack()

        def bring_up() -> Stepper:
            stepper = Stepper(statistics, begin(self._stack), config, report, witness)
            # Not the connection of this moment: a restart puts another in its place.
            self._stack.callback(lambda: stepper.connection.close())
            witness.begin(network, limits, anchor.describe(), lambda: stepper.connection.pads)
            return stepper

        self._bring_up = bring_up
        self._brought_up: Stepper | None = None
        _open.add(self)

    def open(self) -> None:
        """Begins the session and brings a GPU process up, in the calling thread, which is to run the steps.

        Raises:
            TsqpError: what kept it from coming up; nothing is left behind.
        """
        try:
            self._brought_up = self._bring_up()
        except BaseException as error:
            self._closed_by = error
            self._end()
            raise

    def start(self) -> None:
        """Begins the session and brings a GPU process up, unless it is open already, in a thread that runs the steps
        from then on; it sleeps while there is nothing to do. Interrupted, it leaves nothing behind either.

        Raises:
            TsqpError: what kept it from coming up; nothing is left behind.
            RuntimeError: the system grants no thread.
        """
        came_up: SimpleQueue[None] = SimpleQueue()
        # A thread for this too: what a signal handler raises in the middle of it would lose what was just made.
        self._thread = threading.Thread(target=self._run, args=[came_up], name="tsqp-shm runtime", daemon=True)
        try:
            self._thread.start()
            with suppress(Empty):
                self._orders.wait_for(came_up)
        except BaseException:
            self.leave()
            # SYNC POINT: pairs with `_run`, which says that it has begun before it looks whether it may.
            if self._has_begun:
                self._ending.wait()
            else:
                self._thread = None
                self._end()
            raise
        error, self._error_at_begin = self._error_at_begin, None
        if error is not None:
            try:
                raise error
            finally:
                # Or this frame and the error would keep each other.
                del error

    @property
    def _stepper(self) -> Stepper:
        if self._brought_up is None:
            raise TsqpError("this LLM has not come up")
        return self._brought_up

    @property
    def fault(self) -> TsqpError | None:
        """What has ended this session, being closed included; None while it works. An error of the caller's own."""
        if self._pid != os.getpid():
            return TsqpError(f"this LLM belongs to process {self._pid}; a forked child has to make its own")
        if self._brought_up is not None and self._brought_up.fault is not None:
            return self._brought_up.fault.again()
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
        """What the steps run on at this moment; to be looked at, and used only by who runs the steps."""
        return self._stepper.connection

    def add(self, completions: Sequence[Completion], told: Told) -> None:
        """Has completions run, from the same step on.

        Args:
            told: takes an `Update` after each step that made a token of one, the last of which says how it ended.
                Where it is a queue's `put`, `next_update` waits for them.

        Raises:
            TsqpError: the session is over; where it ends after this, the updates say so.
        """
        self.require_working()
        taken = list(completions)
        for completion in taken:
            self._checked(completion.prompt_token_ids, self._limits.max_model_len - 1)
            if self._pad_prompt_to and completion.params.prompt_logprobs is not None:
                raise RequestError("prompt_logprobs", completion.params.prompt_logprobs, _UNROUNDED)
            if completion.vocab_size != self._vocab_size:
                raise RequestError("completion", f"one of {completion.vocab_size} tokens", f"{self._vocab_size}")
            completion.begin()

        def order() -> None:
            self._stepper.add(taken, told)
            fault = self.fault
            if fault is not None:
                self._stepper.end(fault)

        self._order(order)

    def next_update(self, updates: SimpleQueue[Update]) -> Update:
        """The next of a queue whose `put` was handed in with completions; waits for it.

        Raises:
            RequestError: its completion cannot go on.
            TsqpError: there will be none: the session is over, or this is a forked child, in which nobody runs steps.
        """
        if self._pid != os.getpid():
            self.require_working()
        try:
            update = self._orders.wait_for(updates)
        except Empty:
            self._raise_over()
        error = update.error
        if error is not None:
            try:
                raise error
            finally:
                # Or this frame and the error would keep each other, and whatever the update is of.
                del error, update
        return update

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Ends completions before the next step, and has it told; does not wait for it. Those that have ended are left
        as they are."""
        taken = list(completions)
        self._order(lambda: self._stepper.cancel(taken))

    def close_keeper(self, keeper: Keeper) -> None:
        """Keeps no cache for him any more; does not wait for it. For finalisers too, which may run at any moment."""
        self._order(lambda: self._stepper.close_keeper(keeper))

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
            sequence = self._orders.wait_for(reservation.given)
            if sequence is None:
                self._raise_over()
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
        if self._pad_prompt_to:
            raise RequestError("logits", f"those of {len(token_ids)} tokens", _UNROUNDED)
        ids = self._checked(token_ids, self._limits.max_model_len)
        return self._ask(lambda: self._stepper.forward(sequence, ids))

    def _checked(self, token_ids: Sequence[int], most: int) -> list[int]:
        return checked_token_ids(token_ids, most, self._limits.max_model_len, self._vocab_size)

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
        if self._stepper.is_idle:
            self._stepper.connection.rest()
        return not self._stepper.is_idle

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left of the session, here at least: a forked child has none of it."""
        return self._ending.is_said or self._pid != os.getpid()

    def load(self) -> Load:
        """What is in progress between two steps."""
        return self._ask(self._stepper.load)

    def describe(self) -> dict[str, Any]:
        """Mode, weights and processes of this session, and what lies between them, as plain values."""
        if self._pid != os.getpid():
            self.require_working()
        return {**self._stepper.connection.describe(), "weights": self._anchor.describe(), **self._scheduling}

    def facts(self) -> dict[str, Any]:
        """What `describe` says, and what the session has done so far, when it is over too. Units are in the names."""
        return {
            **self._ask(self._stepper.facts, even_if_over=True),
            "weights": self._anchor.describe(),
            **self._scheduling,
        }

    def metrics(self) -> list[Metric]:
        """What the session has come to so far, when it is over too. Does not wait for a step to end."""
        if self._pid != os.getpid():
            self.require_working()
        return self._stepper.metrics()

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
            IntegrityError: a false result has ended the session, and no request of it was left to be told.
        """
        if self._pid != os.getpid():
            return
        if not self._is_leaving:
            self._closed_by = by
        self._is_awaited = self._thread is not threading.current_thread()
        self.leave()
        if self._thread is None:
            self._end()
        elif self._thread is not threading.current_thread():
            # Not by joining: a join that is interrupted takes the thread for ended.
            self._ending.wait()
        error, self._error_at_end = self._error_at_end, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    def _run(self, came_up: SimpleQueue[None]) -> None:
        try:
            # A signal that the kernel gave to this thread would not interrupt the main thread's wait.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - FAULTS)
            self._has_begun = True
            if self._is_leaving:
                raise TsqpError(CLOSED)
            if self._brought_up is None:
                self._brought_up = self._bring_up()
        except BaseException as error:
            # Whatever it is, somebody waits for it, and is told when nothing is left.
            self._closed_by = self._error_at_begin = error
            self._end()
            came_up.put(None)
            return
        came_up.put(None)
        try:
            self._run_steps(self._stepper)
        except BaseException as error:
            # None is expected; whoever waits must not do so for ever.
            self._stepper.end(TsqpError(f"the thread that runs the steps has failed: {type(error).__name__}: {error}"))
        finally:
            self._end()

    def _run_steps(self, stepper: Stepper) -> None:
        while not self._is_leaving:
            if stepper.is_idle:
                stepper.connection.rest()
                self._orders.take(wait=True, timeout_s=stepper.patience_s)
                stepper.expire()
            else:
                self._orders.take()
                stepper.step()

    def _raise_over(self) -> NoReturn:
        self.require_working()
        raise TsqpError(CLOSED)

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

        try:
            return self._orders.ask(checked)
        except Empty:
            self._raise_over()

    def _end(self) -> None:
        if self._ending.is_said:
            return
        error, self._closed_by = self._closed_by, None
        try:
            if self._brought_up is not None:
                self._brought_up.end(TsqpError(CLOSED))
            self._stack.__exit__(type(error) if error else None, error, None)
            untold = None if self._brought_up is None else self._brought_up.untold
            if error is None and isinstance(untold, IntegrityError):
                # A GPU process that is found out when all have what they asked for is told of all the same.
                raise untold.again()
        except Exception as failure:
            if self._is_awaited:
                self._error_at_end = failure
            else:
                # Nobody is there to be told: its holder has let go of it.
                with suppress(Exception):
                    warnings.warn(str(failure), RuntimeWarning, stacklevel=1)
        finally:
            # Or it would keep the frames in which it came up.
            del error
            self._orders.end()
            self._ending.say()


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
        try:
            runtime.close()
        except Exception as error:
            # Nobody asks for it any more, and it must not be unsaid.
            with suppress(Exception):
                warnings.warn(str(error), RuntimeWarning, stacklevel=1)
    # Hooks that were registered before this one are the program's, and find its handlers.
    for number, handler in ours.items():
        signal.signal(number, handler)
