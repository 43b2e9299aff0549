"""Continuous batching: which completions take part in the next forward pass, and with how many tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import RequestError
from tsqp_shm.modes import MODES
from tsqp_shm.shm.plan import Plan
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.caches import Cache, Caches, Keeper
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


@dataclass
class _Run:
    """What a completion that is being computed has.

    Attributes:
        sequence: its cache.
        surplus: how many rows more than it has its prompt is to look as if it had.
        turn: among prompts, that of the lowest number comes next.
    """

    sequence: int
    surplus: int
    turn: int


class Scheduler:
    """Runs completions together, as many as there are caches; the others wait in their order.

    Decoding completions go first, one token each. Prompts get what is left of max_batch_tokens, and while anything
    decodes not more than prefill_budget, so that no answer stands still for the whole of somebody's prompt. They take
    turns: one gets as much as there is, the next one what that leaves, and who has had a part goes behind those who
    have not. All of it follows from lengths alone.
    """

    def __init__(
        self, engine: Engine, plan: Plan, statistics: Statistics, config: EngineConfig, witness: Witness | None = None
    ) -> None:
        self._engine = engine
        self._witness = witness or Witness()
        self._statistics = statistics
        self._are_own = not MODES[plan.limits.mode].splits_attention
        self._max_batch_tokens = plan.limits.max_batch_tokens
        self._max_model_len = plan.limits.max_model_len
        self._prefill_budget = config.prefill_budget or self._max_batch_tokens
        # Prompts look from outside as if they had the next multiple of so many tokens; 0: as they are.
        self._pad_prompt_to = config.pad_prompt_to
        self._keeps_prefixes = config.reuses_prefixes
        self._caches = Caches(plan.limits.max_num_seqs)
        self._waiting: deque[Completion | Reservation] = deque()
        self._running: dict[Completion, _Run] = {}
        self._num_turns = 0

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing: also where all caches are reserved, however many wait for one."""
        return not self._running and not (self._waiting and self._caches.num_free)

    @property
    def load(self) -> tuple[int, int]:
        """How many completions run and how many wait."""
        return len(self._running), len(self._waiting)

    @property
    def num_free_sequences(self) -> int:
        return self._caches.num_free

    def add(self, completion: Completion) -> None:
        """Has it run, or ends it with an error where it cannot be."""
        self._statistics.requests.add(completion)
        keeper = completion.keeper
        if keeper is not None and any(each.keeper is keeper for each in self._completions):
            completion.fail(RequestError("conversation", "a turn while one is in progress", "one after the other"))
            self._statistics.requests.end(completion)
            return
        self._witness.add(completion)
        completion.queued_s = time.monotonic()
        self._waiting.append(completion)

    def cancel(self, completion: Completion, reason: str = "cancelled") -> None:
        """Ends a completion; its cache is free for the next one."""
        completion.cancel(reason)
        if completion in self._waiting:
            self._waiting.remove(completion)
        self._release(completion)

    def close_keeper(self, keeper: Keeper) -> None:
        """Nothing is kept for him any more."""
        self._caches.close(keeper)

    def reserve(self, reservation: Reservation) -> None:
        """Gives it a cache when its turn has come, behind the completions that wait already."""
        self._waiting.append(reservation)
        self._admit()

    def give_back(self, reservation: Reservation) -> None:
        """Ends a reservation, whether it has its cache or still waits."""
        if reservation in self._waiting:
            self._waiting.remove(reservation)
        elif reservation.sequence is not None:
            self._caches.give_back(reservation.sequence)
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
            self._caches.forget()
            for completion in self._running:
                completion.lose_cached()

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
            if completion in self._running:
                run = self._running[completion]
                run.surplus -= chunk.num_surplus
                run.turn = self._next_turn()
            # What ended while the step lasted takes nothing of it.
            if completion.finish_reason is None:
                self._statistics.generated += harvest.give(completion)
                self._statistics.requests.look(completion)
            if completion.finish_reason is not None:
                self._release(completion)

    def _admit(self) -> None:
        """Gives free caches to who has waited longest."""
        while self._waiting and self._caches.num_free:
            first = self._waiting.popleft()
            if isinstance(first, Reservation):
                first.give(self._caches.take().sequence)
            else:
                self._begin(first)

    def _begin(self, completion: Completion) -> None:
        cache = self._caches.take(completion.keeper if self._keeps_prefixes else None)
        completion.find_cached(cache)
        num_new = completion.num_uncached
        surplus = 0
        if self._pad_prompt_to:
            room = self._max_model_len - len(completion.prompt_token_ids)
            surplus = min(-num_new % self._pad_prompt_to, room)
        self._running[completion] = _Run(cache.sequence, surplus, self._next_turn())
        completion.scheduled_s = time.monotonic()
        self._statistics.requests.begin(completion)

    def _next_turn(self) -> int:
        self._num_turns += 1
        return self._num_turns

    def _next_batch(self) -> list[tuple[Completion, Chunk]]:
        batch = [(each, self._chunk(each, 1)) for each in self._running if each.decodes]
        prompts = {each: self._num_rows(each) for each in self._running if not each.decodes}
        budget = self._max_batch_tokens - len(batch)
        if batch:
            budget = min(budget, self._prefill_budget)
        parts: dict[Completion, int] = {}
        for completion in sorted(prompts, key=lambda each: self._running[each].turn):
            parts[completion] = min(budget, prompts[completion])
            budget -= parts[completion]
        ahead = 0
        for completion, num_rows in prompts.items():
            if parts[completion]:
                batch.append((completion, self._chunk(completion, parts[completion], ahead)))
            else:
                ahead += num_rows
        return batch

    def _num_rows(self, completion: Completion) -> int:
        """How many are to come that are known."""
        return completion.num_uncached + self._running[completion].surplus

    def _chunk(self, completion: Completion, num_rows: int, ahead: int = 0) -> Chunk:
        """The next rows of a completion."""
        run = self._running[completion]
        # In the first steps, so that the prompt's last row goes when that of as long a prompt would. Of what they leave
        # in the cache nothing is read before it is written again.
        surplus = min(num_rows, run.surplus)
        token_ids = completion.uncached_token_ids(num_rows - surplus)
        return Chunk(
            run.sequence,
            completion.cached,
            [*token_ids, *(0 for _ in range(surplus))],
            completion.num_wanted(completion.cached + len(token_ids)) if token_ids else 0,
            self._num_rows(completion) - num_rows,
            surplus,
            ahead,
        )

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
        run = self._running.pop(completion, None)
        if run is None:
            return
        if completion.keeper is None or not self._keeps_prefixes:
            self._caches.give_back(run.sequence)
        else:
            # In the middle of a step too: what that still writes there lies behind these tokens.
            held = completion.all_token_ids[: completion.cached]
            number = None if completion.receipt is None else completion.receipt.request
            self._caches.keep(completion.keeper, Cache(run.sequence, held, number))
