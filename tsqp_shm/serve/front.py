"""What all requests of a server share: the session, once it is up, who may use it, and how much of it at once."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request

from tsqp_shm.errors import IntegrityError, TsqpError
from tsqp_shm.llm import LLM
from tsqp_shm.metrics import Metric
from tsqp_shm.modes import MODES
from tsqp_shm.serve.admission import Admission, HeldBytes
from tsqp_shm.serve.generation import HandOver
from tsqp_shm.serve.refusal import Refusal
from tsqp_shm.serve.settings import ServeSettings, digest_of
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.sampling_params import UNASKED, SamplingParams

T = TypeVar("T")
# Requests whose records can be asked for; the oldest go.
_MOST_RECEIPTS = 4096
# Of tokenizing, which is done in one other process in any case.
_THREADS = 2


class Front:
    """Used on the event loop alone.

    Attributes:
        model_name: what clients call the model.
        mode: of the session.
        started_s: as `time.time` has it.
        hand_over: of updates to the event loop; there when the session is up.
    """

    hand_over: HandOver

    def __init__(self, settings: ServeSettings, mode: str, model_name: str, max_num_seqs: int) -> None:
        self.settings, self.mode, self.model_name = settings, mode, model_name
        self.admission = Admission(max_num_seqs, settings.max_queue)
        self.held = HeldBytes(settings.max_held_bytes)
        self.started_s = int(time.time())
        self.defaults = UNASKED
        self._llm: LLM | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "tsqp-shm front")
        # Of its own: texts that take long must not keep from being seen how the server is.
        self._looking = ThreadPoolExecutor(1, "tsqp-shm look")
        # By request id: whose it is, and what its answers' evidence is found by.
        self._receipts: OrderedDict[str, tuple[bytes | None, list[int]]] = OrderedDict()

    def open(self, llm: LLM) -> None:
        """The session is up."""
        asked = llm.get_default_sampling_params()
        # A model that says nothing is drawn from at temperature 1, as OpenAI's clients expect where they do not say.
        self.defaults = SamplingParams(max_tokens=None) if asked == UNASKED else replace(asked, max_tokens=None)
        self.hand_over = HandOver()
        self._llm = llm

    def close(self) -> None:
        for threads in (self._threads, self._looking):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def fault(self) -> TsqpError | None:
        """What has ended the session."""
        return None if self._llm is None else self._llm.runtime.fault

    @property
    def unready(self) -> Refusal | None:
        """Why no request is answered at this moment; None: they are."""
        if self._llm is None:
            return Refusal(503, "the model is being loaded", kind="server_error", code="loading")
        fault = self.fault
        if fault is not None:
            code = "integrity_error" if isinstance(fault, IntegrityError) else type(fault).__name__
            reason = str(fault) if isinstance(fault, IntegrityError) else "the session is over"
            return Refusal(503, reason, kind="server_error", code=code)
        if self.admission.is_draining:
            return Refusal(503, "the server is about to end", kind="server_error", code="draining")
        return None

    @property
    def max_model_len(self) -> int | None:
        return None if self._llm is None else self._llm.max_model_len

    def pads(self) -> dict[str, Any] | None:
        """What has become of the session's pads; None where there are none."""
        return None if self._llm is None else self._llm.runtime.connection.pads

    @property
    def llm(self) -> LLM:
        """Raises:
        Refusal: requests are not answered.
        """
        unready = self.unready
        if unready is not None or self._llm is None:
            raise unready or Refusal(503, "no session", kind="server_error")
        return self._llm

    async def look(self, function: Callable[[], T]) -> T:
        """As `aside`, of what says how the session is."""
        return await self._in(self._looking, function)

    async def aside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Has a thread do what would keep the loop from others.

        Raises:
            Refusal: for each error of the session's or the request's.
        """
        return await self._in(self._threads, lambda: function(*arguments))

    async def _in(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, function)
        except TsqpError as error:
            raise Refusal.of(error) from None

    def principal(self, request: Request) -> bytes | None:
        """Who asks, as the digest of a key; None where none is needed.

        Raises:
            Refusal: no key, or one that is not known.
        """
        known = self.settings.key_digests
        if not known:
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = digest_of(key.strip() if scheme.lower() == "bearer" else "")
        # All are compared, and each in constant time: neither which one fits nor how far one fits can be timed.
        found = [hmac.compare_digest(given, each) for each in known]
        if not any(found):
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refusal(401, "no valid API key was given", code="invalid_api_key", headers=headers)
        return given

    def require_model(self, name: str | None) -> None:
        """Raises:
        Refusal: it is another one.
        """
        if name is not None and name != self.model_name:
            raise Refusal(
                404, f"there is no such model; this is {self.model_name}", param="model", code="model_not_found"
            )

    def keep_receipts(
        self, request_id: str, principal: bytes | None, completions: Sequence[Completion]
    ) -> dict[str, str]:
        """Remembers by what the evidence of a request is found. Returns the headers that say so to its requester."""
        receipts = {each.receipt.request: each.receipt for each in completions if each.receipt is not None}
        if not receipts:
            return {}
        self._receipts[request_id] = principal, list(receipts)
        while len(self._receipts) > _MOST_RECEIPTS:
            self._receipts.popitem(last=False)
        nonces = ",".join(receipt.nonce.hex() for receipt in receipts.values())
        return {"X-TSQP-Evidence": request_id, "X-TSQP-Nonce": nonces}

    def evidence_of(self, numbers: Sequence[int]) -> bytes | None:
        """As `LLM.evidence_of`."""
        return None if self._llm is None else self._llm.evidence_of(numbers)

    def metrics(self) -> list[Metric]:
        """Of the session; of one that has not come up, none."""
        return [] if self._llm is None else self._llm.get_metrics()

    def facts(self) -> dict[str, Any]:
        """What the page shows of the session as it is at this moment."""
        facts: dict[str, Any] = {"running": 0, "waiting": 0, "pads": None, "processes": [_process("tee", self.unready)]}
        if MODES[self.mode].has_gpu_process:
            facts["processes"].append(_process("gpu", self.unready))
        if self._llm is not None and self.fault is None:
            load = self._llm.runtime.load()
            facts |= {"running": load.running, "waiting": load.waiting, "pads": self.pads()}
        return facts

    def receipts_of(self, request_id: str, principal: bytes | None) -> list[int]:
        """Raises:
        Refusal: there are none for who asks.
        """
        owner, numbers = self._receipts.get(request_id, (None, []))
        # One answer for what is not there and for what is another's.
        if not numbers or owner != principal:
            raise Refusal(404, "there is no evidence of such a request of this key", code="not_found")
        return numbers


def _process(role: str, unready: Refusal | None) -> dict[str, Any]:
    words = {"loading": "loads the model", "draining": "about to end"}
    if unready is None:
        state = "ready" if role == "tee" else "answers"
    elif role == "gpu" and unready.code == "integrity_error":
        state = "gave a false result"
    else:
        state = words.get(unready.code or "", "over")
    return {"role": role, "state": state, "is_well": unready is None}
