"""Who may call an LLM, and what becomes of it: threads, an event loop, signal handlers, forks, finalisers, the end."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
from models import FastStart, RandomModel, model_folder, random_token_ids, token_ids

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import TsqpError
from tsqp_shm.modes import MODES
from tsqp_shm.shm.posix.folder import sessions_folder
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.shm.transport import Hold
from tsqp_shm.tee.updates import Update

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0)
PROMPTS = [list(random_token_ids(3 * (1 + index % 5), seed=index)) for index in range(16)]


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


Begin = Callable[..., LLM]
# Sessions, by how their sides wake each other; where there is one side, by its mode.
KINDS = [{"doorbell": "adaptive"}, {"doorbell": "spin"}, {"doorbell": "zmq"}, {"mode": "tee-only"}]
of_any_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: next(iter(kind.values())))


@pytest.fixture(scope="module")
def begin(fast: FastStart, model: Path) -> Begin:
    def begin(mode: str = "plain", max_model_len: int = 128, **config: object) -> LLM:
        if not MODES[mode].has_gpu_process:
            return LLM(model, mode=mode, max_model_len=max_model_len, **config)
        return fast.llm(model, mode=mode, dtype="float32", max_model_len=max_model_len, **config)

    return begin


@pytest.fixture(scope="module", params=["plain", "tee-only"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone_in(begin: Begin) -> Callable[[str], list[list[int]]]:
    """What each prompt gives in a mode when nobody else asks for anything."""

    @functools.cache
    def alone_in(mode: str) -> list[list[int]]:
        with begin(mode) as llm:
            return [token_ids(llm.generate([prompt], PARAMS))[0] for prompt in PROMPTS]

    return alone_in


@pytest.fixture(scope="module")
def shared_llm(begin: Begin, mode: str) -> Iterator[LLM]:
    with begin(mode) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(alone_in: Callable[[str], list[list[int]]], mode: str) -> list[list[int]]:
    return alone_in(mode)


@pytest.fixture
def llm(shared_llm: LLM, alone: list[list[int]]) -> Iterator[LLM]:
    """The module's LLM; whatever a caller did to it, it still works afterwards."""
    yield shared_llm
    assert token_ids(shared_llm.generate(PROMPTS[:1], PARAMS)) == alone[:1]


def test_threads_share_batches_and_each_gets_what_it_gets_alone(llm, alone):
    steps = llm.statistics.steps
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda prompt: token_ids(llm.generate([prompt], PARAMS))[0], PROMPTS))
    assert given == alone
    assert llm.statistics.steps - steps < len(PROMPTS) * PARAMS.max_tokens


def test_threads_mix_what_they_ask_for(llm, alone):
    logits = llm.logits(PROMPTS[0])

    def ask(number: int) -> bool:
        if number % 4 == 0:
            return bool((llm.logits(PROMPTS[0]) == logits).all())
        if number % 4 == 1:
            return len(llm.stats()["operations"]) > 0
        if number % 4 == 2:
            stream = llm.stream(PROMPTS[number], PARAMS)
            next(stream, None)
            stream.close()
            return True
        return token_ids(llm.generate([PROMPTS[number]], PARAMS)) == [alone[number]]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(16)))


def test_an_event_loop_takes_updates_from_a_queue_of_its_own(llm, alone):
    async def tokens_of(prompt: list[int]) -> list[int]:
        updates: asyncio.Queue = asyncio.Queue()
        told = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, updates.put_nowait)
        llm.runtime.add([llm.start(prompt, PARAMS)], told)
        tokens: list[int] = []
        while True:
            update = await updates.get()
            tokens += update.token_ids
            if update.is_last:
                return tokens

    async def everybody() -> list[list[int]]:
        return await asyncio.gather(*map(tokens_of, PROMPTS))

    assert asyncio.run(everybody()) == alone


def test_a_cancelled_await_of_a_thread_leaves_the_others_alone(llm, alone):
    async def main() -> list[list[int]]:
        tasks = [asyncio.create_task(asyncio.to_thread(llm.generate, [prompt], PARAMS)) for prompt in PROMPTS]
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks[::2], return_exceptions=True)
        return [token_ids(await task)[0] for task in tasks[1::2]]

    assert asyncio.run(main()) == alone[1::2]


class Interrupted(Exception):
    """What a signal handler of the embedding program raises."""


@of_any_kind
def test_a_signal_handler_that_raises_ends_its_own_wait_alone(begin, alone_in, kind):
    """At ever later moments: of the call, of a step, between two of them."""
    alone = alone_in(kind.get("mode", "plain"))

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    with begin(**kind) as llm:
        stream = llm.stream(PROMPTS[1], PARAMS)
        previous = signal.signal(signal.SIGUSR1, interrupt)
        try:
            for delay in range(20):
                timer = threading.Timer(delay / 2000, os.kill, (os.getpid(), signal.SIGUSR1))
                with pytest.raises(Interrupted):
                    timer.start()
                    while True:
                        llm.generate(PROMPTS, PARAMS)
                timer.join()
                assert token_ids(llm.generate(PROMPTS[:1], PARAMS)) == alone[:1]
        finally:
            signal.signal(signal.SIGUSR1, previous)
        assert list(stream) == []


def test_closing_in_one_thread_ends_what_another_waits_for_in_one_clear_error(begin):
    for kind in KINDS:
        llm = begin(max_model_len=512, **kind)
        updates: SimpleQueue[Update] = SimpleQueue()
        llm.runtime.add([llm.start([1], SamplingParams(max_tokens=400, temperature=0))], updates.put)
        updates.get()
        with ThreadPoolExecutor(4) as pool:
            waiting = [
                pool.submit(llm.generate, [prompt] * 3, SamplingParams(max_tokens=400, temperature=0))
                for prompt in PROMPTS
            ]
            llm.close()
            for future in waiting:
                with pytest.raises(TsqpError, match="this LLM is closed"):
                    future.result()
        with pytest.raises(TsqpError, match="this LLM is closed"):
            llm.generate([1])


def test_what_the_thread_of_the_steps_is_made_to_call_may_not_wait_for_it(llm, alone):
    """A function that is told, or a finaliser that Python's collector runs there."""
    said: SimpleQueue[str] = SimpleQueue()

    def told(update: Update) -> None:
        for ask in (lambda: llm.generate([1]), lambda: llm.logits([1]), lambda: llm.stats()):
            try:
                ask()
            except TsqpError as error:
                said.put(str(error))

    llm.runtime.add([llm.start(PROMPTS[0], PARAMS)], told)
    assert [said.get().split(";")[0] for _ in range(3)] == ["asked by the thread that runs the steps"] * 3


def test_callers_that_ask_without_end_do_not_keep_the_steps_waiting(llm, alone):
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            llm.stats()
            llm.logits([1])

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        try:
            assert token_ids(llm.generate(PROMPTS, PARAMS)) == alone
        finally:
            stop.set()
        for future in asking:
            future.result()


def test_a_deadline_passes_though_all_caches_are_reserved(begin, mode):
    with begin(mode, max_model_len=64, max_num_seqs=1) as llm, llm.runtime.sequence():
        late = llm.generate([[1]], SamplingParams(deadline_s=0.1, temperature=0, max_tokens=64))
        assert late[0].outputs[0].finish_reason == "deadline"


def test_a_report_that_raises_is_its_owner_s_affair(fast, model, alone_in):
    said = []
    dies_at = [30]

    def report(line: str) -> None:
        said.append(line)
        if "restart" in line:
            raise ZeroDivisionError(line)

    def start_gpu(session: Hold) -> None:
        fast.start_gpu(model, session, dies_at=dies_at.pop() if dies_at else 0)

    config = {"dtype": "float32", "max_model_len": 128, "restart_gpu": 1}
    with LLM(model, start_gpu=start_gpu, report=report, **config) as llm:
        assert token_ids(llm.generate(PROMPTS[:2], PARAMS)) == alone_in("plain")[:2]
    assert any("restart 1 of 1" in line for line in said)


def test_a_forked_child_gets_one_error_for_each_call_and_leaves_its_parent_s_alone(llm, alone, forked):
    def child() -> None:
        for call in (
            lambda: llm.generate(PROMPTS, PARAMS),
            lambda: next(llm.stream(PROMPTS[0])),
            lambda: llm.logits([1]),
            lambda: llm.start([1]),
            lambda: llm.stats(),
            lambda: llm.bring_up(),
        ):
            with pytest.raises(TsqpError, match="forked child"):
                call()
        llm.close()
        with llm:
            pass

    forked(child).join()
    assert token_ids(llm.generate(PROMPTS[:2], PARAMS)) == alone[:2]


def test_a_hundred_threads_of_which_some_give_up(llm, alone):
    def ask(number: int) -> bool:
        prompt = PROMPTS[number % len(PROMPTS)]
        completion = llm.start(prompt, PARAMS)
        if number % 5 == 0:
            return token_ids(llm.generate([prompt], PARAMS)) == [alone[number % len(PROMPTS)]]
        if number % 5 == 1:
            return (
                list(llm.stream_completion(completion)) == [] and completion.token_ids == alone[number % len(PROMPTS)]
            )
        if number % 5 == 2:
            return llm.logits(prompt).shape == (len(prompt), 257)
        if number % 5 == 3:
            llm.runtime.add([completion], lambda update: None)
            llm.runtime.cancel([completion])
            return True
        late = llm.generate([prompt], SamplingParams(deadline_s=0.001, temperature=0, max_tokens=64))[0].outputs[0]
        return late.finish_reason == "deadline"

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(ask, range(100)))


def test_cancelling_in_one_thread_ends_what_another_waits_for(llm):
    """By nothing that is wrong: it has asked for more than this caller wants."""
    completions = [
        llm.start(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True, temperature=0)) for _ in range(2)
    ]
    with ThreadPoolExecutor(1) as pool, llm.runtime.sequence():
        # Behind a batch that fills all caches, so that it is cancelled while it waits or runs, as it happens.
        pieces = pool.submit(list, llm.stream_completion(completions[0]))
        updates: SimpleQueue[Update] = SimpleQueue()
        llm.runtime.add([completions[1]], updates.put)
        while not pieces.done():
            llm.runtime.cancel(completions)
        assert pieces.result() == []
        assert completions[0].finish_reason == "cancelled"
        while not (update := llm.runtime.next_update(updates)).is_last:
            pass
        assert update.finish_reason == "cancelled"


def test_a_deadline_in_the_far_future_is_as_good_as_none(begin, mode):
    with begin(mode, max_model_len=64, max_num_seqs=1) as llm:
        for deadline_s in (1e10, 1e300):
            with ThreadPoolExecutor(1) as pool, llm.runtime.sequence():
                late = pool.submit(
                    llm.generate, [[1]], SamplingParams(max_tokens=3, deadline_s=deadline_s, temperature=0)
                )
                assert llm.stats()["mode"] == mode
            assert len(late.result()[0].outputs[0].token_ids) == 3


def test_a_forked_child_gets_nothing_of_a_stream_of_its_parent_s(llm, alone, forked):
    completion = llm.start(PROMPTS[0], PARAMS)
    updates: SimpleQueue[Update] = SimpleQueue()
    llm.runtime.add([completion], updates.put)
    stream = llm.stream(PROMPTS[1], PARAMS)

    def child() -> None:
        with pytest.raises(TsqpError, match="forked child"):
            llm.runtime.next_update(updates)
        with pytest.raises(TsqpError, match="forked child"):
            next(stream)

    forked(child).join()
    assert list(stream) == []
    while not llm.runtime.next_update(updates).is_last:
        pass
    assert completion.token_ids == alone[0]


def test_a_forked_child_makes_one_of_its_own_and_so_does_its_child(llm, begin, mode, alone, forked):
    def child(generations: int) -> None:
        with begin(mode, tee_threads=2) as own:
            assert token_ids(own.generate(PROMPTS[:3], PARAMS)) == alone[:3]
            if generations:
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        child(generations - 1)
                        code = 0
                    finally:
                        os._exit(code)
                assert os.waitpid(pid, 0)[1] == 0
                assert token_ids(own.generate(PROMPTS[:3], PARAMS)) == alone[:3]

    forked(child, 1).join()


def test_a_fork_in_the_middle_of_a_step_disturbs_nobody(llm, alone, forked):
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(llm.generate, [prompt], PARAMS) for prompt in PROMPTS]
        children = [forked(llm.close) for _ in range(5)]
        assert [token_ids(future.result())[0] for future in asking] == alone
    for child in children:
        child.join()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_can_be_neither_copied_nor_pickled_and_says_so(llm, how):
    with pytest.raises(TypeError, match="an LLM is a session of this process and cannot be copied or pickled"):
        how(llm)


def raise_in(thread: threading.Thread, kind: type[BaseException]) -> None:
    """Has another thread raise it, at its next instruction of Python."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(kind)) == 1


def test_an_exception_that_is_set_for_a_caller_s_thread_gets_there_while_it_waits(llm, alone):
    caught: SimpleQueue[BaseException] = SimpleQueue()

    def ask() -> None:
        try:
            llm.generate([[1]])
        except Interrupted as error:
            caught.put(error)

    with contextlib.ExitStack() as stack:
        # No cache is left, so it waits until it is interrupted.
        for _ in range(llm.config.max_num_seqs):
            stack.enter_context(llm.runtime.sequence())
        waiting = threading.Thread(target=ask)
        waiting.start()
        while not llm.runtime.load().waiting:
            pass
        raise_in(waiting, Interrupted)
        waiting.join()
    assert isinstance(caught.get(), Interrupted)


@pytest.mark.parametrize("kind", [SystemExit, MemoryError])
@pytest.mark.parametrize("is_idle", [True, False])
def test_what_goes_wrong_in_the_thread_of_the_steps_is_told_to_all(begin, mode, kind, is_idle):
    others = set(threading.enumerate())
    with begin(mode, max_model_len=512) as llm:
        (thread,) = [thread for thread in set(threading.enumerate()) - others if "runtime" in thread.name]
        with ThreadPoolExecutor(3) as pool:
            asking = []
            if not is_idle:
                asking += [
                    pool.submit(llm.generate, [[number]], SamplingParams(max_tokens=400, temperature=0))
                    for number in range(2)
                ]
                while not llm.runtime.load().running:
                    pass
            raise_in(thread, kind)
            # The one that wakes it, and what it finds in its queue.
            asking.append(pool.submit(llm.logits, [1, 2]))
            for future in asking:
                with pytest.raises(TsqpError, match=f"failed: {kind.__name__}"):
                    future.result()
        with pytest.raises(TsqpError, match=f"failed: {kind.__name__}"):
            llm.generate([[1]])


def test_a_handler_may_close_what_is_being_closed(begin, mode):
    for delay in range(6):
        llm = begin(mode, max_model_len=64)
        previous = signal.signal(signal.SIGUSR1, lambda number, frame, llm=llm: llm.close())
        try:
            timer = threading.Timer(delay / 5000, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            llm.close()
            timer.join()
        finally:
            signal.signal(signal.SIGUSR1, previous)
        assert llm.runtime.has_ended


# Of what makes an LLM: a signal handler may raise between any two lines of it.
MAKERS = (
    "/tsqp_shm/llm.py",
    "/tsqp_shm/assembly.py",
    "/tsqp_shm/tee/",
    "/tsqp_shm/shm/",
    "/tsqp_shm/roles/",
    "/contextlib.py",
)


class RaiseAtLine:
    """Raises before the line of that number, counted from the first that is traced."""

    def __init__(self, number: int) -> None:
        self._lines = 0
        self._number = number

    def __call__(self, frame, event, argument):
        if not any(part in frame.f_code.co_filename for part in MAKERS):
            return None
        if event == "line":
            self._lines += 1
            if self._lines == self._number:
                sys.settrace(None)
                raise Interrupted
        return self


def test_whoever_is_interrupted_while_an_llm_comes_up_leaves_nothing(begin, mode):
    def is_interrupted_at(number: int) -> bool:
        sys.settrace(RaiseAtLine(number))
        try:
            with begin(mode, max_model_len=64):
                sys.settrace(None)
        except Interrupted:
            return True
        finally:
            sys.settrace(None)
        return False

    def held() -> set[object]:
        return {path for path in sessions_folder().iterdir() if path.is_dir()} | set(threading.enumerate())

    others = held()
    # A few in an ordinary run, each line once in a while.
    number = 1 + int(time.time()) % 23
    while is_interrupted_at(number):
        number += 23
        # At once, but where the interrupted had it already, and has let go of it.
        end_s = time.monotonic() + 10
        while left := held() - others:
            assert time.monotonic() < end_s, (number, left)
            time.sleep(0.01)
    assert number > 100


# What a program does with an LLM before it goes on or ends; it prints what is left.
SCRIPT = """
import gc, json, os, sys, threading, time
from tsqp_shm import LLM, SamplingParams
def left():
    return os.path.exists(f"/dev/shm{ARENA}"), os.path.exists(FOLDER), gpu and os.path.exists(f"/proc/{gpu}")
def wait_until_gone():
    while any(left()):
        time.sleep(0.02)
model, ARENA, FOLDER, session = sys.argv[1:5]
settings = {"max_model_len": 64, **json.loads(sys.argv[5])}
llm = LLM(model, session=session, **settings)
tokens = llm.generate([[5, 6]], SamplingParams(max_tokens=3, temperature=0))[0].outputs[0].token_ids
gpu = llm.bring_up()["processes"].get("gpu", {}).get("pid")
def works():
    return llm.generate([[5, 6]], SamplingParams(max_tokens=3, temperature=0))[0].outputs[0].token_ids == tokens
def child(act):
    pid = os.fork()
    if pid == 0:
        act()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert works()
"""
DROPPED = {
    "dropped": "del llm; wait_until_gone()",
    "in a cycle": "llm.me = llm; del llm; gc.collect(); wait_until_gone()",
    "after errors, without a collector": """
gc.disable()
os.kill(gpu, 9)
for ask in ("generate", "logits", "stream", "start"):
    for _ in range(2):
        try: list(getattr(llm, ask)([1]))
        except Exception as error: died = str(error)
del llm; wait_until_gone()
""",
    "while a stream is open": "s = llm.stream([1]); next(s, 0); del llm, s; wait_until_gone()",
    "whose reports go to who holds it": """
class Server:
    def __init__(self):
        self.llm = LLM(model, session=session + "2", **settings, report=self.say)
    def say(self, line): self.said = line
server = Server(); assert server.said
gpu = server.llm.bring_up()["processes"].get("gpu", {}).get("pid"); llm.close()
del server; gc.collect(); wait_until_gone()
""",
    "bound anew": """
llm = LLM(model, session=session + "2", **settings)
x = [{i: [i]} for i in range(200000)]; gc.collect(); wait_until_gone()
assert llm.generate([[5, 6]], SamplingParams(max_tokens=3, temperature=0))[0].outputs[0].token_ids == tokens
""",
    "at exit": "pass",
    "at exit, from a hook": "import atexit; atexit.register(llm.close)",
    "at exit, as another module's": "sys.held = llm; del llm",
    "at exit, while daemons wait": """
params = SamplingParams(max_tokens=50, ignore_eos=True, temperature=0)
def ask():
    try: llm.generate([[1]], params)
    except Exception: pass
for number in range(4): threading.Thread(target=ask, daemon=True).start()
stream = llm.stream([1], params); next(stream, 0)
""",
    "at exit, while another comes up": """
def make():
    try: LLM(model, session=session + "3", **settings)
    except Exception: pass
threading.Thread(target=make, daemon=True).start(); time.sleep(0.4)
""",
    "in a finaliser of another thread": """
class Holder:
    def __del__(self): self.llm.close()
holder = Holder(); holder.llm = llm; holder.me = holder
del llm, holder
thread = threading.Thread(target=gc.collect); thread.start(); thread.join(); wait_until_gone()
""",
    "at exit, in a thread": """
params = SamplingParams(max_tokens=50, ignore_eos=True, temperature=0)
threading.Thread(target=llm.generate, args=([[1]], params)).start()
""",
    "by an impatient user": """
import signal, subprocess
os.kill(gpu, signal.SIGSTOP)
signals = subprocess.Popen(["sh", "-c", f"for i in 1 2 3 4 5 6; do sleep 0.2; kill -INT {os.getpid()}; done"])
try: llm.close()
except KeyboardInterrupt: pass
""",
    "a child that ends": "child(lambda: None)",
    "a child that ends at once": "child(lambda: os._exit(7))",
    "a child that leaves the block": "child(lambda: llm.__exit__(None, None, None))",
    "a child that drops it": """
def drop():
    global llm
    del llm; gc.collect()
child(drop)
""",
    "a worker of multiprocessing": """
import multiprocessing
for method in ("fork", "spawn", "forkserver"):
    with multiprocessing.get_context(method).Pool(2) as pool: assert pool.map(abs, [-1, -2]) == [1, 2]
    try: multiprocessing.get_context(method).Process(target=id, args=[llm]).start()
    except TypeError as error: assert method != "fork" and "cannot be copied or pickled" in str(error)
assert works()
""",
}


# One of each kind in every run.
OFTEN = {
    "dropped",
    "after errors, without a collector",
    "at exit, in a thread",
    "a child that ends",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param(how, marks=[] if how in OFTEN else pytest.mark.long) for how in DROPPED])
@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"mode": "tee-only"}], ids=["plain", "tee-only"])
def test_an_llm_that_nobody_closes_leaves_nothing(model, how, settings):
    if "mode" in settings and ("kill(gpu" in DROPPED[how] or "server.said" in DROPPED[how]):
        pytest.skip("there is no GPU process, to be killed or to report")
    session = f"dropped{os.getpid()}"
    arguments = [model, arena_name(session), sessions_folder() / session, session, json.dumps(settings)]
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SCRIPT + DROPPED[how], *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert not [path for path in sessions_folder().iterdir() if path.name.startswith(session)]
    assert not list(Path("/dev/shm").glob(f"{arena_name(session)[1:]}*"))
