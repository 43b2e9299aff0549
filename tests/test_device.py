"""Devices that are not the CPU: results that arrive late, ways of pinning, memory, and what fails.

What needs a CUDA device is marked `gpu`; the rest holds the same code against a device that is late on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from arenas import new_arena
from commands import assert_one_line, run
from late_device import LateDevice
from local_session import LocalGpus, with_device
from models import (
    RandomModel,
    fast_start,
    greedy_of_transformers,
    model_folder,
    random_token_ids,
    relative_distance,
    token_ids,
    transformers_logits,
)
from pretended_cuda import PretendedCuda

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.bench.latency.copies import compare_copies, measured_copies
from tsqp_shm.config import DOORBELLS
from tsqp_shm.errors import ConfigError, DeviceError, PeerDied
from tsqp_shm.gpu.device import Device, require_memory
from tsqp_shm.gpu.pinning import CudaDriver, choose_pinning
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan

PROMPTS = [list(random_token_ids(length, seed=length)) for length in (1, 40, 7, 100)]
MAX_TOKENS = 12
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
# Many operations in flight: blocks of one tile, tiles of few rows.
SMALL = {"tile_rows": 8, "block_rows": 8, "max_model_len": 160, "dtype": "float32"}
WAYS = ("registered", "staged", "pageable")


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return [greedy_of_transformers(model, [prompt], MAX_TOKENS)[0] for prompt in PROMPTS]


class Made:
    """GPU roles on threads of this process, which compute on a device that the test makes."""

    def __init__(self, model: Path, make: Callable[[Arena], Device], monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpus = LocalGpus(model)
        self.devices: list[Device] = []

        def remember(arena: Arena) -> Device:
            self.devices.append(make(arena))
            return self.devices[-1]

        with_device(remember, monkeypatch)

    def llm(self, **config: object) -> LLM:
        return self.gpus.llm(**SMALL, **config)

    def join(self) -> None:
        """Waits for the thread's end; it must not be by an error."""
        (thread,) = self.gpus.threads
        thread.stop()
        assert str(thread.death()) == "the gpu process died (its thread ended)"


@pytest.fixture
def made(model, monkeypatch) -> Iterator[Callable[..., Made]]:
    every = []

    def make(make_device: Callable[[Arena], Device]) -> Made:
        every.append(Made(model, make_device, monkeypatch))
        return every[-1]

    yield make
    assert not [thread for one in every for thread in one.gpus.threads if thread.is_alive]


@pytest.mark.parametrize("doorbell", DOORBELLS)
@pytest.mark.parametrize("looks", [0, 1, 50])
def test_results_that_arrive_late_are_the_same(made, expected, doorbell, looks):
    late = made(lambda arena: LateDevice(arena, looks))
    with late.llm(doorbell=doorbell) as llm:
        found = token_ids(llm.generate(PROMPTS, GREEDY))
    late.join()
    assert found == expected
    if looks == 50:
        # The next operation began while the results of others were on their way.
        assert late.devices[0].most_running > 2


def test_a_device_that_is_lost_ends_both_sides_with_a_line(made):
    lost = torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")
    late = made(lambda arena: LateDevice(arena, failure=(9, lost)))
    with late.llm() as llm, pytest.raises(PeerDied, match="device cpu: CUDA error: unspecified launch failure"):
        llm.generate(PROMPTS, GREEDY)


@pytest.mark.parametrize("way", WAYS)
def test_the_cuda_devices_own_code_gives_the_same_on_a_pretended_device(made, expected, monkeypatch, way):
    cuda = PretendedCuda()
    cuda.put_in_place(monkeypatch)
    pretended = made(lambda arena: cuda.open(arena, way))
    with pretended.llm() as llm:
        assert llm.bring_up()["transfer"] == way
        assert cuda.registered == (way == "registered")
        found = token_ids(llm.generate(PROMPTS, GREEDY))
    pretended.join()
    assert found == expected
    # Before the arena is unmapped, which has happened.
    assert not cuda.registered


def test_copies_and_arithmetic_wait_for_each_other(monkeypatch):
    plan = Plan.of_slots([("given", "bfloat16", 4, 16), ("result", "bfloat16", 4, 16)])
    cuda = PretendedCuda()
    cuda.put_in_place(monkeypatch)
    with new_arena(plan) as arena:
        device = cuda.open(arena, "auto")
        device.reserve(0, 0)
        given, result = plan.slots
        device.output(result, 16, (2, 16)).copy_(device.input(given, 0, (2, 16)))
        delivery = device.finish()
        assert not delivery.is_complete()
        assert cuda.notes == [
            "copies in: copy",
            "compute: waits for copies in",
            "copies out: waits for compute",
            "copies out: copy",
            "copies out: event",
        ]
        del delivery
        device.close()


def test_memory_is_asked_for_before_anything_is_loaded(made, monkeypatch):
    cuda = PretendedCuda(free_bytes=1000)
    cuda.put_in_place(monkeypatch)
    pretended = made(lambda arena: cuda.open(arena, "auto"))
    with pytest.raises(DeviceError, match="1,000 are free"):
        pretended.llm()
    assert not cuda.registered


class FakeDriver:
    """A driver that refuses as told; remembers what is registered."""

    def __init__(self, register: str = "", pinned: str = "") -> None:
        self._register, self._pinned = register, pinned
        self.registered: list[int] = []

    def register(self, address: int, size_bytes: int) -> str:
        if not self._register:
            self.registered.append(address)
        return self._register

    def unregister(self, address: int) -> None:
        self.registered.remove(address)

    def pinned_refusal(self) -> str:
        return self._pinned


NO_REGISTER, NO_PINNED = "cuMemHostRegister: CUDA_ERROR_NOT_SUPPORTED (801)", "no pinned memory: out of memory"


@pytest.mark.parametrize(
    ("wanted", "refusals", "way", "reason"),
    [
        ("auto", ("", ""), "registered", ""),
        ("auto", (NO_REGISTER, ""), "staged", NO_REGISTER),
        ("auto", (NO_REGISTER, NO_PINNED), "pageable", f"{NO_REGISTER}; {NO_PINNED}"),
        ("registered", ("", NO_PINNED), "registered", ""),
        ("staged", ("", ""), "staged", "as asked"),
        ("pageable", ("", ""), "pageable", "as asked"),
    ],
)
def test_the_best_way_of_pinning_that_is_allowed_is_taken(wanted, refusals, way, reason):
    driver = FakeDriver(*refusals)
    chosen = choose_pinning(wanted, driver, "cuda:0", 4096, 8192)
    assert (chosen.way, chosen.reason) == (way, reason)
    assert driver.registered == ([4096] if way == "registered" else [])


@pytest.mark.parametrize(("wanted", "refusal"), [("registered", NO_REGISTER), ("staged", NO_PINNED)])
def test_a_way_of_pinning_that_is_refused_is_not_replaced(wanted, refusal):
    with pytest.raises(DeviceError) as caught:
        choose_pinning(wanted, FakeDriver(NO_REGISTER, NO_PINNED), "cuda:1", 4096, 8192)
    assert str(caught.value).startswith(f"device cuda:1: --pinning {wanted} cannot be had: {refusal}; ")


def test_pinning_is_for_cuda(model):
    assert_one_line(run("launch", str(model), "--device", "cpu", "--pinning", "staged", "-q"), 2, "pinning", "in place")
    assert_one_line(run("launch", str(model), "--pinning", "locked", "-q"), 2, "pinning", "registered")
    with pytest.raises(ConfigError, match="pinning"):
        LLM(model, pinning="locked")


@pytest.mark.parametrize(
    ("needed", "remedy"),
    [
        ((900, 50, 51), "lower --max-model-len or --max-num-seqs, --max-batch-tokens"),
        ((900, 51, 50), "lower --max-model-len or --max-num-seqs"),
        ((1001, 0, 0), "a smaller model or a larger device is needed"),
    ],
)
def test_too_little_memory_is_said_with_the_figures(needed, remedy):
    require_memory("cuda:0", 1000, 900, 50, 50)
    with pytest.raises(DeviceError) as caught:
        require_memory("cuda:0", 1000, *needed)
    weights, cache, slots = needed
    assert f"{sum(needed):,} bytes" in str(caught.value)
    assert f"weights {weights:,}, cache {cache:,}, slots {slots:,}) and 1,000 are free; {remedy}" in str(caught.value)


def test_copies_are_compared_with_the_bus():
    plan = Plan.of_slots([("copied", "bfloat16", 1, 1 << 16)])
    with new_arena(plan) as arena:
        devices = {"staged": LateDevice(arena, looks=20_000), "bus": LateDevice(arena, looks=0)}
        rows = compare_copies(devices, plan.slots[0], runs=3)
        for device in devices.values():
            device.close()
    directions = ["to the device", "from the device"]
    assert [(row["way"], row["direction"]) for row in rows] == list(itertools.product(devices, directions))
    assert {row["share_of_bus"] for row in rows if row["way"] == "bus"} == {1.0}
    # It waits for what is on its way.
    assert all(row["share_of_bus"] < 1 for row in rows if row["way"] == "staged")
    assert {row["bytes"] for row in rows} == {1 << 17}


def test_without_a_driver_no_copies_are_measured():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device")
    assert measured_copies() == {"rows": [], "refused": {}, "reason": "no CUDA driver"}


@pytest.mark.gpu
def test_copies_of_every_way_are_measured():
    found = measured_copies(1 << 20, 2)
    assert found["reason"] == ""
    assert {row["way"] for row in found["rows"]} | set(found["refused"]) == {*WAYS, "bus"}


@pytest.fixture(scope="module")
def on_cuda() -> Iterator[Callable[..., LLM]]:
    with fast_start("cuda") as starter:
        yield starter.llm


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_each_way_of_pinning_gives_the_same_tokens(on_cuda, model, expected, way, doorbell):
    with on_cuda(model, pinning=way, doorbell=doorbell, **SMALL) as llm:
        assert llm.bring_up()["transfer"] == way
        assert token_ids(llm.generate(PROMPTS, GREEDY)) == expected


@pytest.mark.gpu
def test_a_refused_registration_leaves_no_error_behind():
    torch.cuda.synchronize()
    driver = CudaDriver()
    # No memory lies there.
    assert driver.register(1 << 46, 4096).startswith("cuMemHostRegister: CUDA_ERROR_")
    assert torch.ones(8, device="cuda").sum().item() == 8
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_cache_that_the_device_cannot_hold_is_refused_before_loading(tmp_path):
    positions = 1 << 20
    model = RandomModel("llama", {"max_position_embeddings": positions}).write(tmp_path / "long")
    # Beyond any device there is: 2 layers of 2 heads of 24, for 1,024 sequences of a million tokens.
    flags = ("--device", "cuda", "--max-model-len", str(positions), "--max-num-seqs", "1024", "--tile-rows", "1", "-q")
    assert_one_line(run("launch", str(model), *flags), 1, "cache", "are free", "--max-model-len")


@pytest.mark.gpu
def test_logits_on_cuda_are_those_of_transformers(on_cuda, model):
    ids = random_token_ids(100)
    with on_cuda(model, dtype="float32", max_model_len=160) as llm:
        found = llm.logits(ids)
    assert relative_distance(found, transformers_logits(model, ids)) < 1e-4
