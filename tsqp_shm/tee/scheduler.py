"""Continuous batching: which completions take part in the next forward pass, and with how many tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from tsqp_shm.modes import MODES
from tsqp_shm.shm.plan import Plan
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.engine import Engine
from tsqp_shm.tee.harvest import Harvest
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.witness import Witness


class Reservation:
    """A cache that no completion uses, promised to whoever waits for it.

    Args:
        give_back: called with the reservation when nobody holds it any more, at any moment and on any thread.

    Attributes:
        sequence: the cache's index, while it is promised.
        given: gets it, once; None where the session has ended instead.
    """

    # Of the class, as one whose maker was interrupted is finalised too.
    sequence: int | None = None

    def __init__(self, give_back: Callable[[Reservation], None]) -> None:
        self.given: SimpleQueue[int | None] = SimpleQueue()
        self._give_back = give_back

    def __del__(self) -> None:
        # However early a caller was interrupted: a cache that is lost would be so for the rest of the session.
        if self.sequence is not None:
            self._give_back(self)

    @property
    def is_given(self) -> bool:
        return not self.given.empty()

    def give(self, sequence: int | None) -> None:
        """None: there will be none."""
        self.sequence = sequence
        self.given.put(sequence)


class Scheduler:
    """Runs completions together, as many as there are caches; the others wait in their order.

    Decoding completions go first, one token each; what is left of max_batch_tokens goes to prompts, in chunks.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        statistics: Statistics,
        witness: Witness | None = None,
        pad_prompt_to: int = 0,
    ) -> None:
        """Args:
        pad_prompt_to: prompts look from outside as if they had the next multiple of so many tokens; 0: as they are.
        """
        self._engine = engine
        self._witness = witness or Witness()
        self._statistics = statistics
        self._are_own = not MODES[plan.limits.mode].splits_attention
        self._max_batch_tokens = plan.limits.max_batch_tokens
        self._free_sequences = list(reversed(range(plan.limits.max_num_seqs)))
        self._waiting: deque[Completion | Reservation] = deque()
        self._running: dict[Completion, int] = {}
        self._pad_prompt_to = pad_prompt_to
        # How many rows more than they have prompts of running completions are to look as if they had.
        self._surplus: dict[Completion, int] = {}
        self._max_model_len = plan.limits.max_model_len

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing: also where all caches are reserved, however many wait for one."""
        return not self._running and not (self._waiting and self._free_sequences)

    @property
    def load(self) -> tuple[int, int]:
        """How many completions run and how many wait."""
        return len(self._running), len(self._waiting)

    @property
    def num_free_sequences(self) -> int:
        return len(self._free_sequences)

    def add(self, completion: Completion) -> None:
        self._witness.add(completion)
        self._statistics.requests.add(completion)
        completion.queued_s = time.monotonic()
        self._waiting.append(completion)

    def cancel(self, completion: Completion, reason: str = "cancelled") -> None:
        """Ends a completion; its cache is free for the next one."""
        completion.cancel(reason)
        if completion in self._waiting:
            self._waiting.remove(completion)
        self._release(completion)

    def reserve(self, reservation: Reservation) -> None:
        """Gives it a cache when its turn has come, behind the completions that wait already."""
        self._waiting.append(reservation)
        self._admit()

    def give_back(self, reservation: Reservation) -> None:
        """Ends a reservation, whether it has its cache or still waits."""
        if reservation in self._waiting:
            self._waiting.remove(reservation)
        elif reservation.sequence is not None:
            self._free_sequences.append(reservation.sequence)
            reservation.sequence = None
            self._admit()

    def refuse_reservations(self) -> None:
        """Tells all that wait that there will be no cache."""
        for reservation in [waiting for waiting in self._waiting if isinstance(waiting, Reservation)]:
            self._waiting.remove(reservation)
            reservation.give(None)

    def start_over(self, engine: Engine) -> None:
        """Goes on with another engine; where it does not find what lay in the old one's caches, that is computed
        again."""
        self._engine = engine
        if not engine.keeps_caches:
            for completion in self._running:
                completion.cached = 0

    @property
    def patience_s(self) -> float | None:
        """How long until a deadline passes; None: none will."""
        left = [completion.left_s for completion in self._completions if completion.left_s is not None]
        return max(0.0, min(left)) if left else None

    def expire(self) -> None:
        """Ends the completions whose deadline has passed; in the middle of a step too, which goes on without them."""
        for completion in self._completions:
            if completion.left_s is not None and completion.left_s < 0:
                self.cancel(completion, "deadline")

    @property
    def _completions(self) -> list[Completion]:
        waiting = [waiting for waiting in self._waiting if isinstance(waiting, Completion)]
        return [*waiting, *self._running]

    def step(self) -> None:
        """One forward pass: prompts get on, and every completion whose prompt is in the cache grows by a token.

        Raises:
            PeerDied, PeerTimeout, ProtocolError: the session is over; no completion has grown.
        """
        self.expire()
        self._admit()
        batch = self._with_pads(self._next_batch())
        if not batch:
            return
        harvest = Harvest(batch, self._statistics, are_own=self._are_own)
        self._witness.begin_pass(batch)
        products = self._engine.forward([chunk for _, chunk in batch], harvest.take)
        harvest.bring_in()
        self._witness.end_pass(batch, products)
        self._statistics.steps += 1
        for completion, chunk in batch:
            self._statistics.tokens += len(chunk.token_ids)
            completion.cached += chunk.num_tokens
            if completion in self._surplus:
                self._surplus[completion] -= chunk.num_surplus
            # What ended while the step lasted takes nothing of it.
            if completion.finish_reason is None:
                self._statistics.generated += harvest.give(completion)
                self._statistics.requests.look(completion)
            if completion.finish_reason is not None:
                self._release(completion)

    def _admit(self) -> None:
        """Gives free caches to who has waited longest."""
        while self._waiting and self._free_sequences:
            first, sequence = self._waiting.popleft(), self._free_sequences.pop()
            if isinstance(first, Reservation):
                first.give(sequence)
            else:
                self._running[first] = sequence
                first.scheduled_s = time.monotonic()
                self._statistics.requests.begin(first)
                self._surplus[first] = self._num_surplus(len(first.prompt_token_ids))

    def _next_batch(self) -> list[tuple[Completion, Chunk]]:
        batch = []
        budget = self._max_batch_tokens
        by_phase = sorted(self._running, key=lambda completion: not completion.token_ids)
        for completion in by_phase:
            if budget == 0:
                break
            num_tokens, surplus = len(completion.all_token_ids), min(budget, self._surplus[completion])
            token_ids = completion.uncached_token_ids(budget - surplus)
            end = completion.cached + len(token_ids)
            # In the first steps, so that the prompt's last row goes when that of as long a prompt would. Of what they
            # leave in the cache nothing is read before it is written again.
            pending = num_tokens - end + self._surplus[completion] - surplus
            chunk = Chunk(
                self._running[completion],
                completion.cached,
                [*token_ids, *(0 for _ in range(surplus))],
                completion.num_wanted(end) if token_ids else 0,
                pending,
                surplus,
            )
            budget -= len(chunk.token_ids)
            batch.append((completion, chunk))
        return batch

    def _num_surplus(self, num_tokens: int) -> int:
        if self._pad_prompt_to == 0:
            return 0
        return min(-num_tokens % self._pad_prompt_to, self._max_model_len - num_tokens)

    def _with_pads(self, batch: list[tuple[Completion, Chunk]]) -> list[tuple[Completion, Chunk]]:
        """Without the completions that end because pads for them are to be had and are not."""
        lacking = self._engine.lack_pads([chunk for _, chunk in batch])
        for index, error in lacking.items():
            completion, _ = batch[index]
            completion.fail(error)
            self._release(completion)
        return [each for index, each in enumerate(batch) if index not in lacking]

    def _release(self, completion: Completion) -> None:
        self._statistics.requests.end(completion)
        self._surplus.pop(completion, None)
        sequence = self._running.pop(completion, None)
        if sequence is not None:
            self._free_sequences.append(sequence)
