"""An arena whose pages somebody takes away: an error that says so, and never a signal that ends the process."""

import ctypes
import faulthandler
import mmap
import os
import resource
import secrets
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from arenas import attach_arena, new_arena
from models import RandomModel, fast_start, model_folder

from tsqp_shm import SamplingParams, _native
from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu import _products
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.slots import open_slots

ROWS, ELEMENTS = 512, 1024
PLAN = Plan.of_slots([("a", "float32", ROWS, ELEMENTS)])


@pytest.fixture
def name():
    return f"/tsqp-shm-test-{secrets.token_hex(4)}"


def truncate(name: str, size_bytes: int = 0) -> None:
    os.truncate(f"/dev/shm{name}", size_bytes)


def test_a_truncated_arena_is_an_error_at_its_next_use_and_ever_after(name, forked):
    def use():
        with new_arena(PLAN, name) as arena, open_slots(arena) as slots:
            out = np.ones((2, ELEMENTS), np.float32)
            truncate(name)
            with pytest.raises(ProtocolError, match="cut the object short") as caught:
                _native.load_rows(slots.table, 0, 0, 2, out)
            assert caught.value.field == "arena"
            assert (out == 0).all()
            # Nothing is read of what somebody maps there next.
            truncate(name, PLAN.total_bytes)
            for use_again in (
                lambda: _native.load_word(arena.buffer, 0),
                lambda: _native.store_rows(slots.table, 0, 0, 2, out),
                lambda: _native.RingReader(arena.buffer, "completion").read(0, 0),
                lambda: _native.RingReader(arena.buffer, "completion").park(),
                lambda: _native.RingWriter(arena.buffer, "submission").write(bytes(64)),
            ):
                with pytest.raises(ProtocolError, match="arena"):
                    use_again()

    forked(use).join()


def test_what_a_ring_makes_of_the_zeros_is_not_what_is_reported(name, forked):
    def use():
        with new_arena(PLAN, name) as arena:
            writer = _native.RingWriter(arena.buffer, "completion")
            reader = _native.RingReader(arena.buffer, "completion")
            writer.write(bytes(64))
            reader.read(0, 0)
            truncate(name)
            with pytest.raises(ProtocolError) as caught:
                reader.read(0, 0)
            assert caught.value.field == "arena"
            writer.release()
            reader.release()

    forked(use).join()


def test_threads_of_native_code_survive_too(name, forked):
    """Their signals are blocked, and a fault that is blocked where it happens kills whatever handler there is."""

    def use():
        _native.set_num_threads(2)
        with new_arena(PLAN, name) as arena, open_slots(arena) as slots:
            heartbeat = _native.Heartbeat(arena.buffer, "tee", 1)
            out = np.empty((ROWS, ELEMENTS), np.float32)
            _native.load_rows(slots.table, 0, 0, ROWS, out)
            truncate(name)
            with pytest.raises(ProtocolError, match="arena"):
                while True:  # until the heartbeat's thread, or this one, has found it gone
                    _native.load_word(arena.buffer, layout.TEE_HEARTBEAT_OFFSET_BYTES)
            for _ in range(20):
                with pytest.raises(ProtocolError, match="arena"):
                    _native.load_rows(slots.table, 0, 0, ROWS, out)
            heartbeat.release()

    forked(use).join()


def test_the_products_of_the_gpu_process_survive_it_and_its_next_look_at_the_arena_does_not(name, forked):
    """They are in an extension of their own, and the handler is not."""
    width, plan = 64, Plan.of_slots([("x", "bfloat16", ROWS, 64), ("logits", "bfloat16", ROWS, ELEMENTS)])
    instruction_set = _native.active_instruction_set()
    if _products.panel_kernels(instruction_set) is None:
        pytest.skip(f"{instruction_set} has no packed products")

    def use():
        _products.set_num_threads(2)
        with new_arena(plan, name) as arena, open_slots(arena) as slots:
            sizes = dict.fromkeys(("num_layers", "num_heads", "num_kv_heads"), 1)
            sizes |= dict.fromkeys(("hidden", "intermediate", "head_dim"), width)
            sizes |= {"vocabulary": ELEMENTS, "max_tokens": ROWS}
            products = _products.CpuProducts(slots.table, instruction_set, np.zeros((1, 1), np.int32), **sizes)
            products.set_lm_head(np.ones((ELEMENTS, width), np.uint16))
            products.lm_head(0, 1, 0, ROWS)
            truncate(name)
            for _ in range(20):
                products.lm_head(0, 1, 0, ROWS)
            with pytest.raises(ProtocolError, match="arena"):
                _native.load_word(arena.buffer, 0)

    forked(use).join()


def test_a_part_that_was_cut_off_is_noticed_when_it_is_used(name, forked):
    def use():
        with new_arena(PLAN, name) as arena, open_slots(arena) as slots:
            truncate(name, layout.SLOTS_OFFSET_BYTES)
            _native.load_word(arena.buffer, 0)
            with pytest.raises(ProtocolError, match="arena"):
                _native.store_rows(slots.table, 0, ROWS - 1, 1, np.ones((1, ELEMENTS), np.float32))

    forked(use).join()


def test_the_next_arena_is_whole_again(name, forked):
    def use():
        for attempt in range(70):
            with new_arena(PLAN, name) as arena:
                _native.load_word(arena.buffer, 0)
                if attempt % 2:
                    truncate(name)
                    with pytest.raises(ProtocolError):
                        _native.load_word(arena.buffer, 0)

    forked(use).join()


def test_whoever_attaches_to_an_arena_that_shrinks_gets_an_error(name, forked, monkeypatch):
    def attach():
        read_header = Arena.attach.__func__.__globals__["_read_header"]

        def shrink_first(*arguments):
            truncate(name)
            return read_header(*arguments)

        monkeypatch.setitem(Arena.attach.__func__.__globals__, "_read_header", shrink_first)
        with pytest.raises(ProtocolError, match="arena"):
            attach_arena(name, PLAN)

    with new_arena(PLAN, name) as arena:
        arena.publish()
        forked(attach).join()


def assert_guarded(arena: Arena) -> None:
    truncate(arena.name)
    with pytest.raises(ProtocolError, match="cut the object short"):
        _native.load_word(arena.buffer, 0)


def touch_what_is_gone(path: str) -> None:
    """A fault that is no arena's."""
    with Path(path).open("w+b") as file:
        file.truncate(4096)
        other = mmap.mmap(file.fileno(), 4096)
        file.truncate(0)
        other[0]


def is_caught() -> bool:
    """Whether this process has a handler for SIGBUS at all."""
    status = Path("/proc/self/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught & 1 << signal.SIGBUS - 1)


@pytest.mark.parametrize("meanwhile", ["enabled", "disabled", "both", "default"])
def test_another_handler_that_comes_or_goes_does_not_take_the_guard_away(name, forked, meanwhile):
    def use():
        faulthandler.disable()
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        if meanwhile == "disabled":
            faulthandler.enable()
        with new_arena(PLAN, name) as arena:
            {"enabled": faulthandler.enable, "disabled": faulthandler.disable}.get(meanwhile, int)()
            if meanwhile == "both":
                faulthandler.enable()
                arena.renew_guard()
                faulthandler.disable()
            if meanwhile == "default":
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
            arena.renew_guard()
            assert_guarded(arena)

    forked(use).join()


@pytest.mark.parametrize("meanwhile", [faulthandler.enable, faulthandler.disable])
def test_an_arena_is_guarded_whatever_was_done_since_the_last_one(name, forked, meanwhile):
    def use():
        for _ in range(3):
            with new_arena(PLAN, name) as arena:
                assert_guarded(arena)
            meanwhile()

    forked(use).join()


def enable() -> None:
    faulthandler.enable(2)


# What is done before there is an arena, while there is one, and whether faulthandler then tells of a fault.
HISTORIES = {
    "none": ([], [], False),
    "enabled before": ([enable], [], True),
    "enabled meanwhile": ([], [enable], True),
    "disabled meanwhile": ([enable], [faulthandler.disable], False),
    "enabled and disabled meanwhile": ([], [enable, faulthandler.disable], False),
    "disabled and enabled meanwhile": ([enable], [faulthandler.disable, enable], True),
}


@pytest.mark.parametrize("is_over", [False, True], ids=["with an arena", "when there is none any more"])
@pytest.mark.parametrize("history", HISTORIES)
def test_a_fault_elsewhere_ends_the_process_once_whoever_is_told_of_it(name, forked, tmp_path, history, is_over):
    before, meanwhile, is_told = HISTORIES[history]
    said = tmp_path / "said"

    def fault():
        faulthandler.disable()
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
        for act in before:
            act()
        arena = new_arena(PLAN, name)
        for act in meanwhile:
            act()
            arena.renew_guard()
        if is_over:
            arena.close()
        else:
            Path(f"/dev/shm{name}").unlink()
        touch_what_is_gone(str(tmp_path / "other"))

    assert forked(fault).wait() == -signal.SIGBUS
    assert said.read_text().count("Fatal Python error: Bus error") == is_told


def has_a_handler_that_mends_nothing() -> None:
    faulthandler.disable()
    signal.signal(signal.SIGBUS, lambda number, frame: None)


def test_faults_elsewhere_in_two_threads_end_the_process_though_a_handler_returns(name, forked, tmp_path):
    """Each comes again and again, in turn with the other's."""

    def fault():
        has_a_handler_that_mends_nothing()
        arena = new_arena(PLAN, name)
        Path(f"/dev/shm{name}").unlink()
        addresses = []
        for number in range(2):
            with (tmp_path / str(number)).open("w+b") as file:
                file.truncate(4096)
                mapped = mmap.mmap(file.fileno(), 4096)
                file.truncate(0)
                addresses.append(mapped)
        # Without the interpreter's lock, which one that faults with it would keep from the other.
        read = ctypes.CDLL(None).memchr
        both = threading.Barrier(2)

        def touch(mapped):
            start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            both.wait()
            read(ctypes.c_void_p(start), 1, ctypes.c_size_t(1))

        threads = [threading.Thread(target=touch, args=(mapped,)) for mapped in addresses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arena.close()

    assert forked(fault).wait() == -signal.SIGBUS


def test_an_arena_whose_pages_cannot_be_replaced_ends_the_process_though_a_handler_returns(name, forked):
    def fault():
        has_a_handler_that_mends_nothing()
        with new_arena(PLAN, name) as arena:
            truncate(name)
            Path(f"/dev/shm{name}").unlink()
            resource.setrlimit(resource.RLIMIT_AS, (1, 1))
            _native.load_word(arena.buffer, 0)

    assert forked(fault).wait() == -signal.SIGBUS


def test_a_signal_that_is_sent_is_the_embedding_program_s(name, forked):
    def use():
        received = []
        signal.signal(signal.SIGBUS, lambda number, frame: received.append(number))
        with new_arena(PLAN, name) as arena:
            os.kill(os.getpid(), signal.SIGBUS)
            assert received == [signal.SIGBUS]
            signal.signal(signal.SIGBUS, signal.SIG_IGN)
            arena.renew_guard()
            os.kill(os.getpid(), signal.SIGBUS)
            assert received == [signal.SIGBUS]
            assert_guarded(arena)

    forked(use).join()


def test_the_handler_goes_with_the_last_arena(name, forked):
    def use():
        faulthandler.disable()
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        with new_arena(PLAN, name), new_arena(PLAN, name + "b"):
            assert is_caught()
        assert not is_caught()
        # What another has put there meanwhile is its own.
        with new_arena(PLAN, name):
            signal.signal(signal.SIGBUS, signal.default_int_handler)
        assert is_caught()
        with new_arena(PLAN, name):
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
        assert not is_caught()

    forked(use).join()


def test_a_session_is_guarded_though_faulthandler_was_disabled_after_it_came_up(forked):
    def use():
        faulthandler.enable()
        with fast.llm(model_folder(RandomModel("llama")), max_model_len=64) as llm:
            faulthandler.disable()
            truncate(llm.bring_up()["arena"]["name"])
            with pytest.raises(ProtocolError, match="cut the object short"):
                llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0))

    with fast_start() as fast:
        forked(use).join()
