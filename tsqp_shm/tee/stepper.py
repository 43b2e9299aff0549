"""The steps of a session: batches of the scheduler on the connection of the moment, and on another when its GPU process
dies.

One thread at a time uses a stepper, see `tee.runtime`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from traceback import clear_frames
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import EvidenceError, IntegrityError, PeerDied, TsqpError
from tsqp_shm.metrics import Metric
from tsqp_shm.modes import MODES
from tsqp_shm.roles.process import peak_resident_bytes
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.caches import Keeper
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.connection import CLOSED, Connect
from tsqp_shm.tee.metrics import Occupancy, metrics
from tsqp_shm.tee.ops import Float32
from tsqp_shm.tee.scheduler import Reservation, Scheduler
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.updates import Outlet, Told
from tsqp_shm.tee.verification import Unverified
from tsqp_shm.tee.witness import Witness

T = TypeVar("T")


class Load(NamedTuple):
    """What is in progress between two steps.

    Attributes:
        running, waiting: completions.
        free_sequences: caches that neither a completion nor a reservation has; one that is kept for a conversation is
            for whoever needs it.
        lent_slots: of slots, the runs of rows that are the GPU process's.
    """

    running: int
    waiting: int
    free_sequences: int
    lent_slots: int


class Stepper:
    """Runs completions and forward passes, step by step.

    Attributes:
        connection: what the steps run on at the moment.
        fault: what has ended the session; None while it works. It stays as it is: who raises it, raises another one
            that is equal, or it would keep the frames of every caller.
        untold: the same, where it has ended nobody's request: all had got what they asked for, or were cancelled, or
            had run out of time.
    """

    def __init__(
        self,
        statistics: Statistics,
        connect: Connect,
        config: EngineConfig,
        report: Callable[[str], None],
        witness: Witness | None = None,
    ) -> None:
        """
        Args:
            config: whose `restart_gpu` is how many GPU processes may take the place of one that died, and whose
                `timeout_s` how long it may take until there is one, however many die meanwhile.
            witness: writes down what comes of completions; None: nobody does.
        """
        self.fault: TsqpError | None = None
        self.untold: TsqpError | None = None
        self._statistics = statistics
        self._connect = connect
        self._max_restarts, self._timeout_s = config.restart_gpu, config.timeout_s
        self._report = report
        self._witness = witness or Witness()
        self._outlets: dict[Completion, Outlet] = {}
        self.connection = connect(self._look, self._timeout_s)
        self._scheduler = Scheduler(self.connection.engine, self.connection.plan, statistics, config, self._witness)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return self._scheduler.is_idle

    def add(self, completions: Sequence[Completion], told: Told) -> None:
        """Has completions run, from the same step on."""
        for completion in completions:
            self._outlets[completion] = Outlet(completion, told)
            self._scheduler.add(completion)
        if any(completion.finish_reason is not None for completion in completions):
            self._tell()

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Ends completions, and tells it. Those that have ended are left as they are."""
        ended = []
        for completion in completions:
            outlet = self._outlets.pop(completion, None)
            if outlet is not None:
                self._scheduler.cancel(completion)
                ended.append(outlet)
        self._write_down()
        for outlet in ended:
            outlet.tell()
        if self.fault is None:
            self._tell_progress()

    def reserve(self, reservation: Reservation) -> None:
        self._scheduler.reserve(reservation)

    def give_back(self, reservation: Reservation) -> None:
        self._scheduler.give_back(reservation)

    def close_keeper(self, keeper: Keeper) -> None:
        self._scheduler.close_keeper(keeper)

    def step(self) -> None:
        """One step, and what is to be told of it. What goes wrong in it ends the session and is told as well."""
        with suppress(TsqpError):
            self._survive(self._step)
        self._tell()

    def _tell(self) -> None:
        for completion, outlet in list(self._outlets.items()):
            if completion.finish_reason is not None:
                del self._outlets[completion]
            if not outlet.tell() and completion.finish_reason is None:
                del self._outlets[completion]
                self._scheduler.cancel(completion)

    @property
    def patience_s(self) -> float | None:
        """How long nothing has to be done where `is_idle`: until a deadline passes; None: for ever."""
        return self._scheduler.patience_s

    def expire(self) -> None:
        """Ends completions whose deadline has passed, and tells it: for who is idle, as a step does it too."""
        self._scheduler.expire()
        self._write_down()
        self._tell()

    def _look(self) -> None:
        """Called now and then in the middle of a step: a deadline ends the wait of who has asked, and not the step,
        whose caches it leaves as they are. What the step does for him still is written down at its end."""
        if self._outlets:
            self._scheduler.expire()
            self._tell()

    def _write_down(self) -> None:
        """Between two steps."""
        try:
            self._witness.look(may_wait=not self.is_idle)
        except TsqpError as error:
            self.end(error)

    def forward(self, sequence: int, token_ids: Sequence[int]) -> Float32:
        """The logits after every token of a sequence.

        Shapes: [T, V] f32.

        Raises:
            PadsExhausted: there are too few, and what has none is to be refused.
            TsqpError: the session is over.
        """
        plan = self.connection.plan
        most = plan.limits.max_batch_tokens
        logits: Float32 = np.empty((len(token_ids), plan.slot("logits").row_elements), np.float32)
        for error in self.connection.engine.lack_pads([Chunk(sequence, 0, token_ids)]).values():
            raise error

        def forward() -> Float32:
            for position in range(0, len(token_ids), most):
                chunk = token_ids[position : position + most]

                copied: list[Unverified[None]] = []

                def take(first: int, rows: Unverified[Float32], at: int = position, copied: Any = copied) -> None:
                    copied.append(rows.map(partial(self._copy, logits, at + first)))

                pending = len(token_ids) - position - len(chunk)
                batch = [(None, Chunk(sequence, position, chunk, num_logits=len(chunk), pending=pending))]
                self._witness.begin_pass(batch)
                products = self.connection.engine.forward([chunk for _, chunk in batch], take)
                for part in copied:
                    part.open()
                self._witness.end_pass(batch, products)
            return logits

        return self._tell_caller(forward)

    @staticmethod
    def _copy(logits: Float32, first: int, rows: Float32) -> None:
        logits[first : first + len(rows)] = rows

    def _tell_caller(self, act: Callable[[], T]) -> T:
        """As `_survive`, for who asks for something himself and is told what ends the session."""
        try:
            return self._survive(act)
        except TsqpError:
            self.untold = None
            raise

    def load(self) -> Load:
        """What is in progress, when whatever the last step left in flight has come back."""
        self.connection.settle()
        running, waiting = self._scheduler.load
        return Load(running, waiting, self._scheduler.num_free_sequences, self.connection.num_lent)

    def metrics(self) -> list[Metric]:
        """What the session has come to so far, when it is over too; any thread may look, at any moment."""
        running, waiting = self._scheduler.load
        limits = self.connection.plan.limits
        occupancy = Occupancy(running, waiting, limits.max_num_seqs, self._scheduler.num_free_sequences)
        has_border = MODES[limits.mode].has_gpu_process
        return metrics(self._statistics, occupancy, self.connection.pads, has_border=has_border)

    def facts(self) -> dict[str, Any]:
        """What `Connection.facts` says, and what this process has computed. Units are in the names."""
        if self.fault is None:
            facts = self._tell_caller(lambda: self.connection.facts(asks=True))
        else:
            facts = self.connection.facts(asks=False)
        facts["processes"]["tee"]["peak_rss_bytes"] = peak_resident_bytes()
        facts["operations"] = self._statistics.operations()
        return facts

    def end(self, fault: TsqpError) -> None:
        """The session is over; whoever waits for something of it is told. Only the first fault counts."""
        is_first = self.fault is None
        if self.fault is None:
            # Without its traceback, which holds the frames of a step.
            self.fault = fault.again()
            if str(fault) != CLOSED:
                self._witness.fail(fault)
        if not isinstance(fault, IntegrityError):
            # Whose deadline has passed as well gets what there is.
            self._scheduler.expire()
            for completion in [each for each in self._outlets if each.finish_reason == "deadline"]:
                self._outlets.pop(completion).tell()
        outlets, self._outlets = self._outlets, {}
        if is_first and not outlets:
            self.untold = self.fault
        # All of them before any is told: no caller may go on with one while another knows of the fault.
        for completion in outlets:
            self._scheduler.cancel(completion)
        with suppress(EvidenceError):
            # The session has ended by a fault already.
            self._witness.look(may_wait=False)
        for outlet in outlets.values():
            outlet.fail(self.fault.again())
        self._scheduler.refuse_reservations()

    def _step(self) -> None:
        self.connection.progress.step_begins(*self._scheduler.load)
        self._scheduler.step()
        self._witness.look(may_wait=not self.is_idle)
        self._tell_progress()

    def _tell_progress(self) -> None:
        self.connection.progress.step_ends(*self._scheduler.load)

    def _survive(self, act: Callable[[], T]) -> T:
        """Does it again with another GPU process where one dies, as often as `restart_gpu` allows.

        Raises:
            TsqpError: the session is over.
        """
        while True:
            try:
                try:
                    self.connection.begin()
                    return act()
                except PeerDied as death:
                    # The error holds the frames of the pass, which may hold the error in turn, and they hold what the
                    # pass had begun: pads that nobody could be given again before a collector came by.
                    clear_frames(death.__traceback__)
                    self._replace_gpu(death)
            except TsqpError as error:
                self.connection.mark_broken()
                self.end(error)
                raise
            except BaseException as error:
                # A fault of this process's own: what it has in flight and in its caches cannot be told.
                self.connection.mark_broken()
                fault = TsqpError(f"a step failed: {type(error).__name__}: {error}")
                self.end(fault)
                if not isinstance(error, Exception):
                    raise
                raise fault from error

    def _replace_gpu(self, death: PeerDied) -> None:
        """Puts another GPU process in the place of one that died; every completion goes on from the tokens it has.

        Raises:
            PeerDied: no restart is left, or no time.
            TsqpError: what kept the other from coming up.
        """
        died_s = time.monotonic()
        while True:
            left_s = died_s + self._timeout_s - time.monotonic()
            if self._statistics.gpu_restarts >= self._max_restarts or left_s <= 0:
                raise death
            self._statistics.gpu_restarts += 1
            self._say(f"{death}\nrestart {self._statistics.gpu_restarts} of {self._max_restarts}")
            self.connection.abandon()
            try:
                self.connection = self._connect(self._look, left_s)
                break
            except PeerDied as another:
                death = another
        self._scheduler.start_over(self.connection.engine)
        self._say(f"the gpu process is back after {time.monotonic() - died_s:.1f} s")

    def _say(self, line: str) -> None:
        # A caller's function that raises is that caller's affair and no fault of the session.
        with suppress(BaseException):
            self._report(line)
