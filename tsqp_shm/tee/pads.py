"""The one-time pads of a session: who makes them, how many are kept ready, and what is done where there are none.

They belong to the TEE process and last as long as its session, whatever becomes of GPU processes. No pad, no key and no
seed is a value of Python's: native code draws them in memory of its own (`native/pads`).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig, Limits
from tsqp_shm.errors import ConfigError, LimitError, PadsExhausted, TsqpError
from tsqp_shm.hardening import harden
from tsqp_shm.model.network import Linear
from tsqp_shm.pad_stock import stock_rows
from tsqp_shm.roles.resources import available_bytes, lockable_bytes
from tsqp_shm.shm.liveness import LOOK_INTERVAL_S
from tsqp_shm.shm.tiling import MAX_BLOCKS

# The only one that there is; another would be named by the evidence of its sessions.
MAKER = "direct"
# A new seed would raise it; a session has one.
_KEY_EPOCH = 0
# Rates are of so long.
_WINDOW_S = 2.0
_REPORT_INTERVAL_S = 2.0


class Pads:
    """Args:
        session, linears_digest: which the keys are derived for.
        weights: of each Linear, at its index: of them pads are made.

    Attributes:
        products_in_tee: rows of products that were computed here for want of pads, or because they were to be.

    Raises:
        ConfigError: the stock has no room for what is to be waited for, or more than there is memory.
        LimitError: the keys cannot be locked in memory, or memory for the stock cannot be had.
    """

    def __init__(
        self,
        session: str,
        linears_digest: str,
        weights: Sequence[_native.FieldLinear],
        config: EngineConfig,
        limits: Limits,
    ) -> None:
        self.products_in_tee = 0
        self._shares_cores = True
        self._has_been_ready = config.pad_ready == 0
        self._are_resting = False
        self._config = config
        row_bytes = _native.PadStock.row_bytes(list(weights))
        self._rows = stock_rows(
            config.pad_stock,
            row_bytes,
            most_rows=max(limits.max_model_len, limits.max_batch_tokens),
            free_bytes=available_bytes(),
            lockable_bytes=lockable_bytes() if config.lock_memory else None,
        )
        self._require_room(limits)
        self._hardening = harden()
        try:
            keys = _native.PadKeys(session.encode(), linears_digest.encode(), _KEY_EPOCH, len(weights))
            stock = _native.PadStock(keys, list(weights), self._rows, config.pad_threads, config.lock_memory)
        except OSError as error:
            raise LimitError("memory", error.strerror or str(error)) from error
        # Whose keys are its own from here on, and end with it.
        self._stock, self._key_id, self._row_bytes = stock, keys.key_id, row_bytes
        # When it was looked at, and how many pads had been made.
        self._began_s = time.monotonic()
        self._looks = deque([(self._began_s, 0)])

    def _require_room(self, limits: Limits) -> None:
        """Raises:
        ConfigError: a block of rows waits for more pads than there ever are at once.
        """
        of_step = min(limits.max_batch_tokens, limits.max_num_seqs * limits.max_model_len)
        of_block = max(limits.block_rows, -(-of_step // MAX_BLOCKS)) + limits.tile_rows
        for name, rows in (
            ("pads_out=wait", min(of_block, of_step) if self.waits else 0),
            ("pad_ready", self._config.pad_ready),
        ):
            if rows > self._rows:
                raise ConfigError(
                    "pad_stock", self._config.pad_stock or self._rows, f"at least {rows} rows, for {name}"
                )

    def meet(self, device: str) -> None:
        """A GPU process is ready, which computes on that device."""
        threads = self._config.threads()
        # One of it waits for the device, if there is another one than the processor.
        busy = threads.tee + (threads.gpu if device.startswith("cpu") else 1)
        self._shares_cores = busy + self._config.pad_threads > len(os.sched_getaffinity(0))

    def work(self, is_busy: bool) -> None:
        """Steps are computed from here on, or none is for the moment: where makers have no core of their own they rest
        meanwhile, but for pads that are waited for."""
        rest = is_busy and self._shares_cores
        if rest != self._are_resting:
            self._stock.rest(rest)
        self._are_resting = rest

    def take_prompts(self, rows: int) -> bool:
        """Whether prompts of so many rows, all that is to come of them, go to the GPU process."""
        if self._config.prefill == "auto":
            # Where it waits for pads, and where it must have them, all rows have some in the end.
            return self._config.pads_out != "tee" or self._stock.available >= rows
        return self._config.prefill == "gpu"

    @property
    def keeps_prompts(self) -> bool:
        """Whether no prompt goes to the GPU process."""
        return self._config.prefill == "tee"

    @property
    def waits(self) -> bool:
        """Whether rows for which there are no pads wait for them."""
        return self._config.pads_out == "wait"

    @property
    def refuses_beyond(self) -> int | None:
        """For how many rows there are pads, where more are refused; None: none is."""
        return self._stock.available if self._config.pads_out == "refuse" else None

    def take(self, linear: Linear, rows: int) -> _native.PadRows | None:
        """Pads for so many rows of a Linear, burned from here on; None: there are too few."""
        return self._stock.take(linear.index, rows)

    def wait(self, linear: Linear, rows: int, look: Callable[[], None]) -> None:
        """Returns when there are so many of a Linear.

        Args:
            look: called now and then; what it raises ends the wait.

        Raises:
            PadsExhausted: none came in time.
        """
        self._wait(lambda: self._stock.wait(linear.index, rows, LOOK_INTERVAL_S), rows, look)

    def wait_until_ready(self, report: Callable[[str], None], look: Callable[[], None]) -> None:
        """Returns when there are as many as are to be there before the first request, which is waited for once.

        Raises:
            PadsExhausted: none came in time.
            TsqpError: what `look` raises.
        """
        rows, told_s = self._config.pad_ready, time.monotonic()
        if self._has_been_ready:
            return

        def is_ready() -> bool:
            nonlocal told_s
            if self._stock.available >= rows:
                return True
            time.sleep(LOOK_INTERVAL_S)
            if time.monotonic() - told_s > _REPORT_INTERVAL_S:
                told_s = time.monotonic()
                report(f"pads: {self._stock.available:,} of {rows:,} rows are made")
            return False

        self._wait(is_ready, rows, look)
        self._has_been_ready = True

    def _wait(self, is_there: Callable[[], bool], rows: int, look: Callable[[], None]) -> None:
        """Until there are some, however long that takes while any are made."""
        made, made_s = self._stock.made, time.monotonic()
        while not is_there():
            look()
            if self._stock.fault is not None:
                raise TsqpError(f"no pads are made any more: {self._stock.fault}")
            if self._stock.made != made:
                made, made_s = self._stock.made, time.monotonic()
            elif time.monotonic() - made_s > self._config.timeout_s:
                raise PadsExhausted(rows, self._stock.available, f"none was made in {self._config.timeout_s:.0f} s")

    @property
    def is_locked(self) -> bool:
        """Whether the stock is kept in memory; keys always are."""
        return self._stock.is_locked

    def describe(self) -> dict[str, Any]:
        """What belongs to the bring-up report, as plain values."""
        return {
            "maker": MAKER,
            "key_id": self._key_id,
            "capacity_rows": self._rows,
            "bytes": self._stock.num_bytes,
            "row_bytes": self._row_bytes,
            "threads": self._config.pad_threads,
            "out": self._config.pads_out,
            "prefill": self._config.prefill,
            "locked": self.is_locked,
            "hardening": dict(self._hardening),
        }

    def facts(self) -> dict[str, Any]:
        """What has become of them so far. Units: rows go through the whole model, a pad is of one row of one Linear."""
        now_s, made = time.monotonic(), self._stock.made
        self._looks.append((now_s, made))
        while len(self._looks) > 2 and now_s - self._looks[1][0] > _WINDOW_S:
            self._looks.popleft()
        then_s, before = self._looks[0]
        return {
            "maker": MAKER,
            "key_id": self._key_id,
            "stock_rows": self._stock.available,
            "capacity_rows": self._rows,
            "made": made,
            "made_per_s": round(made / max(1e-3, now_s - self._began_s)),
            "used": self._stock.used,
            "burned": self._stock.burned,
            "pads_per_s": (made - before) / (now_s - then_s) if now_s > then_s else 0.0,
            "tee_products": self.products_in_tee,
            "fault": self._stock.fault,
        }

    def close(self) -> None:
        """Ends the threads that make them, and gives back the stock's memory; keys are wiped when nothing holds the
        stock any more. Closing twice does nothing."""
        self._stock.close()
