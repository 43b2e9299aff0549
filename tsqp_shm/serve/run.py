"""A server from its first connection to its last: it answers how it is from the start, and requests once the model is
loaded."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn

from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import IntegrityError, TsqpError
from tsqp_shm.llm import LLM
from tsqp_shm.serve.app import application
from tsqp_shm.serve.connections import MAX_HEADER_BYTES, guarded, listening
from tsqp_shm.serve.front import Front
from tsqp_shm.serve.settings import ServeSettings

# So often it is looked whether the session still lives.
_LOOK_S = 0.1
# How long answers that say that the session is over have to be sent.
_LAST_WORDS_S = 2.0
_KEEP_ALIVE_S = 20


def serve(
    load: Callable[[], LLM],
    config: EngineConfig,
    model_name: str,
    settings: ServeSettings,
    report: Callable[[str], None],
    ready: Callable[[LLM], None],
) -> None:
    """Serves until a signal ends it.

    Args:
        load: makes the session; called by another thread, while `/health` says that it is being loaded.
        report: takes a line about what happens.
        ready: called when requests are answered.

    Raises:
        TsqpError: the session did not come up.
        ConfigError: the address cannot be had.
        IntegrityError: a result of the GPU process was false, and that ends the server.
    """
    front = Front(settings, config.mode, model_name, config.max_num_seqs)
    try:
        asyncio.run(_serve(front, load, report, ready))
    finally:
        front.close()


async def _serve(
    front: Front, load: Callable[[], LLM], report: Callable[[str], None], ready: Callable[[LLM], None]
) -> None:
    settings = front.settings
    listener = listening(settings)
    server = _Server(
        uvicorn.Config(
            application(front),
            http=guarded(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(_LAST_WORDS_S),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.ensure_future(server.serve([listener]))
    loading = asyncio.ensure_future(asyncio.to_thread(load))
    stopping = asyncio.ensure_future(stop.wait())
    llm: LLM | None = None
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        report(f"listening on {_address(settings, listener.getsockname())}")
        await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            # It cannot be interrupted, and is closed as soon as it has come up.
            report("stopping when the model is loaded")
            llm = await loading
            return
        llm = loading.result()
        front.open(llm)
        ready(llm)
        fault = await _until_over(front, stop, report)
        if isinstance(fault, IntegrityError):
            if not stop.is_set():
                await asyncio.sleep(_LAST_WORDS_S)
            raise fault
        await _drain(front, stop, report)
    finally:
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await serving
        stopping.cancel()
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)
        if llm is not None:
            await asyncio.to_thread(llm.close)


async def _until_over(front: Front, stop: asyncio.Event, report: Callable[[str], None]) -> TsqpError | None:
    """Until a signal comes, or a false result that ends the server. Returns the latter, whether it has ended it."""
    told = False
    while not stop.is_set():
        fault = front.fault
        if fault is not None and not told:
            told = True
            if isinstance(fault, IntegrityError) and front.settings.on_integrity == "exit":
                return fault
            report(f"the session is over, and every request is answered so: {fault}")
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), _LOOK_S)
    # One that has stayed to say so ends as one that has not.
    return front.fault if isinstance(front.fault, IntegrityError) else None


async def _drain(front: Front, stop: asyncio.Event, report: Callable[[str], None]) -> None:
    """What runs may end; nothing new begins. Another signal ends the wait."""
    front.admission.is_draining = True
    stop.clear()
    end_s = asyncio.get_running_loop().time() + front.settings.drain_s
    if front.admission.under_way:
        report(f"stopping: {front.admission.under_way} completions may end within {front.settings.drain_s:g} s")
    while front.admission.under_way and not stop.is_set() and asyncio.get_running_loop().time() < end_s:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.05)


def _address(settings: ServeSettings, bound: tuple[str, int] | str) -> str:
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    scheme = "http" if settings.ssl_certfile is None else "https"
    host, port = bound[0], bound[1]
    return f"{scheme}://{f'[{host}]' if ':' in str(host) else host}:{port}"


class _Server(uvicorn.Server):
    """Signals are the caller's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
