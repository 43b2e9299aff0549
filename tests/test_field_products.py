"""The products of mode `verified` in the GPU process, by every means that it has, against numpy's int64.

No backend for CUDA has ever run on a card: `torch._int_mm` and bfloat16 digits, multiplied in float32, run here on the
CPU, and what brings rows to a device and back on the pretended one of `pretended_cuda.py`.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from field_reference import THREE_DIGITS, TWO_DIGITS
from local_session import LocalGpus, with_device
from models import RandomModel, model_folder, random_token_ids, token_ids
from pretended_cuda import PretendedCuda

from tsqp_shm import LLM, SamplingParams, _native
from tsqp_shm.config import Limits
from tsqp_shm.errors import DeviceError, ProtocolError
from tsqp_shm.gpu import _products, field_products, worker
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.field_backends import Backend, Bfloat16Backend, Int8Backend, choose_backend
from tsqp_shm.gpu.field_digits import DigitRows, digits_of_rows
from tsqp_shm.gpu.field_products import NativeFieldProducts, TorchFieldProducts
from tsqp_shm.gpu.field_self_test import extreme_rows, extreme_weight, require_exact
from tsqp_shm.model.digest import LinearsDigest
from tsqp_shm.model.field_weights import FIELD, load_field_linear
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Record, SubmissionRules
from tsqp_shm.shm.slots import slot_array

HALF = FIELD // 2
BACKENDS = {"int8": Int8Backend, "bfloat16": Bfloat16Backend}
CAPABILITIES = {"int8": (9, 0), "bfloat16": (10, 3)}
LIMITS = Limits("float32", 96, 3, 40, tile_rows=16, tiles_in_flight=2, mode="verified")
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
PROMPTS = [list(random_token_ids(length, seed=length)) for length in (3, 40, 17, 70)]
SMALL = {"max_model_len": 96, "max_num_seqs": 3, "max_batch_tokens": 32, "block_rows": 16}


def reference(m: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Shapes: m [R, K] of any words; weight [N, K] of int8 -> [R, N] in [0, p). No sum reaches 2^55."""
    result: np.ndarray = (m.astype(np.int64) % FIELD) @ weight.astype(np.int64).T % FIELD
    return result


def multiply(backend: Backend, weight: np.ndarray, m: np.ndarray) -> np.ndarray:
    words = torch.from_numpy(m)
    rows = DigitRows(words, digits_of_rows(words))
    packed = backend.pack(torch.from_numpy(weight))
    return rows.combine(backend.sums(rows.digits, packed, len(weight))).numpy()


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    return BACKENDS[request.param]()


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 40])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (8, 8), (65, 66), (17, 1024), (9, 1025), (5, 3072)])
def test_digits_of_any_rows_give_the_product_in_the_field(backend, rows, outputs, inputs):
    """Rows of two digits, three and four together, of which some words are no elements of the field."""
    random = np.random.default_rng(rows * inputs)
    weight = random.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    bounds = random.choice([9, TWO_DIGITS, THREE_DIGITS, HALF], rows)
    m = np.array([random.integers(-bound, bound + 1, inputs) for bound in bounds]) % FIELD
    m = m.astype(np.uint32)
    m[rows // 2 :: 5, 0] = [FIELD, 2**31, 2**32 - 1][rows % 3]
    np.testing.assert_array_equal(multiply(backend, weight, m), reference(m, weight))


@pytest.mark.parametrize("inputs", [1024, 66_311])
def test_the_largest_sums_of_digits_are_exact(backend, inputs):
    weight, m = extreme_weight(inputs), extreme_rows(inputs)
    np.testing.assert_array_equal(multiply(backend, weight, m), reference(m, weight))


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(0, 2), (TWO_DIGITS, 2), (TWO_DIGITS + 1, 3), (THREE_DIGITS, 3), (THREE_DIGITS + 1, 4), (HALF, 4)],
)
def test_a_row_takes_as_many_digits_as_its_largest_element_needs(largest, expected):
    m = np.zeros((3, 5), np.int64)
    m[0, 2], m[1, 4] = largest, -largest
    assert digits_of_rows(torch.from_numpy((m % FIELD).astype(np.uint32))) == [expected, expected, 2]


@pytest.mark.parametrize(("word", "expected"), [(FIELD, 2), (FIELD + 1, 4), (2**31 + 5, 4), (2**32 - 1, 4)])
def test_a_word_that_is_no_field_element_finds_digits_enough(word, expected):
    m = np.full((1, 3), 7, np.uint32)
    m[0, 1] = word
    assert digits_of_rows(torch.from_numpy(m)) == [expected]


@pytest.mark.parametrize("seed", range(4))
def test_one_wrong_bit_refuses_the_device(backend, seed):
    random = np.random.default_rng(seed)

    def exact(weight: np.ndarray, m: np.ndarray) -> np.ndarray:
        return multiply(backend, weight, m).astype(np.uint32)

    calls = 0

    def wrong_in_the_last(weight: np.ndarray, m: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        y = exact(weight, m)
        if calls == 6:
            y[random.integers(len(m)), random.integers(len(weight))] ^= 1 << random.integers(31)
        return y

    require_exact("cuda:0", exact, [9, 576])
    with pytest.raises(DeviceError, match=r"device cuda:0: its integer products are not exact: of \d+ .* 576 .* 1 are"):
        require_exact("cuda:0", wrong_in_the_last, [576, 9, 576])


def test_a_card_without_the_product_is_refused_in_a_line():
    def missing(weight: np.ndarray, m: np.ndarray) -> np.ndarray:
        raise RuntimeError("addmm_cuda: no such thing\nCUDA kernel errors might be reported later")

    with pytest.raises(DeviceError, match=r"^device cuda:0: it has no integer products: addmm_cuda: no such thing$"):
        require_exact("cuda:0", missing, [64])


def test_operands_of_the_self_test_find_what_devices_get_wrong(backend):
    """Sums that saturate at 2^30, that are rounded to 23 bits, that lose a bit where they are negative; rows that are
    taken for rows of two digits."""
    exact = backend.sums

    def changed(change):
        def wrong(weight, m):
            words = torch.from_numpy(m)
            rows = DigitRows(words, digits_of_rows(words))
            sums = change(exact(rows.digits, backend.pack(torch.from_numpy(weight)), len(weight)))
            return rows.combine(sums).numpy().astype(np.uint32)

        return wrong

    def with_two_digits(weight, m):
        rows = DigitRows(torch.from_numpy(m), [2] * len(m))
        sums = exact(rows.digits, backend.pack(torch.from_numpy(weight)), len(weight))
        return rows.combine(sums).numpy().astype(np.uint32)

    require_exact("d", changed(lambda sums: sums), [4096, 66_311])
    for wrong, inputs in (
        (changed(lambda sums: sums.clamp(-(2**30), 2**30)), 66_311),
        (changed(lambda sums: (sums + 1) & -2), 4096),
        (changed(lambda sums: torch.where(sums < 0, sums | 1, sums)), 4096),
        (with_two_digits, 16),
    ):
        with pytest.raises(DeviceError):
            require_exact("d", wrong, [inputs])


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), Bfloat16Backend), ((7, 5), Int8Backend), ((8, 0), Int8Backend), ((9, 0), Int8Backend),
     ((10, 0), Int8Backend), ((10, 3), Bfloat16Backend), ((12, 0), Int8Backend)],
)  # fmt: skip
def test_a_card_takes_what_it_has_fast(capability, expected, monkeypatch):
    PretendedCuda(capability=capability).put_in_place(monkeypatch)
    assert isinstance(choose_backend(torch.device("cpu")), expected)


class Side:
    """Products of one kind on slots of their own, as the mode loads them."""

    def __init__(self, network: Network, folder: Path, cuda: PretendedCuda | None = None) -> None:
        self.plan = Plan.derive(network, LIMITS)
        arena = SimpleNamespace(plan=self.plan, buffer=mmap.mmap(-1, self.plan.total_bytes))
        self.device = Device(torch.device("cpu"), arena) if cuda is None else cuda.open(arena, "staged")
        self.device.reserve(0, 0)
        self.arrays = {slot.name: slot_array(arena, slot) for slot in self.plan.shared_slots}
        with Checkpoint.open(folder) as checkpoint:
            self.loaded = field_products.load(network, self.plan, checkpoint, self.device, lambda done, total: None)

    def run(self, target: int, first_row: int, rows: int) -> None:
        slots = self.plan.linears[target].slots
        assert slots is not None
        index = [self.plan.slot(name).index for name in slots]
        self.loaded.operations[Opcode.LINEAR](Record(1, 1, Opcode.LINEAR, target, *index, first_row, rows))
        delivery = self.device.finish()
        while not delivery.is_complete():
            pass


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("qwen2"))


@pytest.mark.parametrize("name", ["native", *BACKENDS])
def test_every_linear_of_a_model_multiplies_its_rows_and_no_others(model, name, monkeypatch):
    network = Network.of(ModelSpec.from_folder(model))
    cuda = None
    if name != "native":
        cuda = PretendedCuda(capability=CAPABILITIES[name])
        cuda.put_in_place(monkeypatch)
    side = Side(network, model, cuda)
    random = np.random.default_rng(2)
    with Checkpoint.open(model) as checkpoint:
        weights = [load_field_linear(checkpoint, linear) for linear in network.linears]
    for linear, weight in zip(network.linears, weights, strict=True):
        in_name, out_name = side.plan.linears[linear.index].slots
        m, y = side.arrays[in_name], side.arrays[out_name]
        m[:] = random.integers(-TWO_DIGITS, TWO_DIGITS + 1, m.shape) % FIELD
        m[1], m[2] = THREE_DIGITS, HALF
        y[:] = 77
        rows = min(5, len(y) - 1)
        side.run(linear.index, 1, rows)
        np.testing.assert_array_equal(
            y[1 : rows + 1], reference(m[1 : rows + 1], weight.quantised(0, linear.outputs)), linear.role
        )
        assert (np.delete(y, slice(1, rows + 1), axis=0) == 77).all()
    side.arrays.clear()
    side.device.close()


@pytest.mark.parametrize("way", ["registered", "staged", "pageable"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_session_on_a_pretended_card_says_what_the_tee_says_alone(model, name, way, monkeypatch):
    with LLM(model, mode="tee-only", **SMALL) as llm:
        expected = token_ids(llm.generate(PROMPTS, GREEDY))
    cuda = PretendedCuda(capability=CAPABILITIES[name])
    cuda.put_in_place(monkeypatch)
    with_device(lambda arena: cuda.open(arena, way), monkeypatch)
    gpus = LocalGpus(model)
    with gpus.llm(mode="verified", **SMALL) as llm:
        assert token_ids(llm.generate(PROMPTS, GREEDY)) == expected
    (thread,) = gpus.threads
    thread.stop()
    assert str(thread.death()) == "the gpu process died (its thread ended)"


def test_memory_that_is_asked_for_is_what_weights_take(model, monkeypatch):
    network = Network.of(ModelSpec.from_folder(model))
    plan = Plan.derive(network, LIMITS)
    device = Device(torch.device("cpu"), SimpleNamespace(plan=plan, buffer=mmap.mmap(-1, plan.total_bytes)))
    with Checkpoint.open(model) as checkpoint:
        weights = [load_field_linear(checkpoint, linear) for linear in network.linears]
    memory = field_products.memory(network, plan, device)
    assert (memory.weights_bytes, memory.cache_bytes) == (sum(weight.num_bytes for weight in weights), 0)
    assert memory.arithmetic == f"int8, {_native.field_instruction_set()}"
    for backend in BACKENDS.values():
        products = TorchFieldProducts(plan, device, backend())
        for linear, weight in zip(network.linears, weights, strict=True):
            packed = backend().pack(torch.from_numpy(weight.quantised(0, linear.outputs)))
            assert products.weight_bytes(linear) == packed.numel() * packed.itemsize
    device.close()


def test_the_digest_is_that_of_the_linears_alone(model):
    network = Network.of(ModelSpec.from_folder(model))
    side = Side(network, model)
    digest = LinearsDigest()
    with Checkpoint.open(model) as checkpoint:
        for linear in network.linears:
            digest.add(linear, load_field_linear(checkpoint, linear))
    assert side.loaded.linears_digest == digest.value
    side.arrays.clear()
    side.device.close()


def test_native_products_pass_the_self_test_on_every_instruction_set(isa):
    device = SimpleNamespace(slot_table=lambda: None)
    products = NativeFieldProducts(device)
    require_exact("cpu", products.multiply, [1, 64, 1537, 66_311])


def test_only_linears_are_asked_for_in_this_mode(model):
    plan = Plan.derive(Network.of(ModelSpec.from_folder(model)), LIMITS)
    rules = SubmissionRules(plan, 1)
    assert set(rules.opcodes) == {Opcode.READY, Opcode.LINEAR, Opcode.STATUS, Opcode.STOP}
    crossing = {slot.index for slot in plan.shared_slots}
    assert all(plan.slots[index].dtype == "uint32" for index in crossing)
    private = plan.private_slots[0].index
    good = Record(1, 1, Opcode.LINEAR, 0, plan.slot("m.x").index, plan.slot("y.qkv").index, 0, 1)
    rules.check(good)
    for sequence, (field, value) in enumerate(
        (("in_slot", private), ("out_slot", private), ("in_slot", NO_SLOT), ("num_segments", 1)), 2
    ):
        with pytest.raises(ProtocolError, match=field):
            rules.check(good._replace(sequence=sequence, **{field: value}))


def test_both_pools_of_the_process_get_its_threads(monkeypatch):
    seen = {}
    for name, pool in (("products", _products), ("native", _native)):
        monkeypatch.setattr(pool, "set_num_threads", lambda *given, name=name: seen.update({name: given}))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: seen.update(torch=threads))
    worker.use_threads(3)
    assert seen == {"torch": 3, "products": (3, worker.POOL_PATIENCE_US), "native": (3, worker.POOL_PATIENCE_US)}
