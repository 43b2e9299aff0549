"""The model in this process alone: the same bits whatever computes them, and transformers' logits with int8 weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import field_reference
import numpy as np
import pytest
import torch
from built_engines import LIMITS, Built
from instruction_sets import instruction_set
from models import model_folder, random_token_ids, relative_distance
from test_parity import CASES, Case
from transformers import AutoModelForCausalLM, DynamicCache

from tsqp_shm import _native
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.tee_only import load_tee_only

DEMO_LIMITS = replace(LIMITS, max_model_len=192, max_batch_tokens=192)
ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def computing_with(name: str, threads: int) -> Iterator[None]:
    before = _native.get_num_threads()
    _native.set_num_threads(threads)
    try:
        with instruction_set(name):
            yield
    finally:
        _native.set_num_threads(before)


FIRST, SECOND = random_token_ids(130), random_token_ids(19, seed=1)


def whole(built: Built) -> np.ndarray:
    """A prompt in one piece, and another beside it."""
    return built.logits(Chunk(0, 0, FIRST, len(FIRST)), Chunk(1, 0, SECOND, len(SECOND)))


def in_pieces(built: Built) -> np.ndarray:
    """The same tokens: chunks that begin anywhere, one by one, other sequences beside them."""
    first = [
        built.logits(Chunk(2, position, FIRST[position:end], end - position))
        for position, end in ((0, 1), (1, 60), (60, 64), (64, 65), (65, 100))
    ]
    beside = built.logits(Chunk(0, 0, SECOND, len(SECOND)), Chunk(2, 100, FIRST[100:129], 29))
    last = built.logits(Chunk(1, 0, FIRST[:5]), Chunk(2, 129, FIRST[129:], 1))
    return np.concatenate([*first, beside[len(SECOND) :], last[1:], beside[: len(SECOND)]])


@functools.cache
def reference_of(folder: Path) -> tuple[np.ndarray, dict[tuple[int, int], np.ndarray]]:
    """Logits and what every Linear gives, in plain integers and scalar kernels."""
    with computing_with("scalar", 1):
        built = Built(folder, linears="numpy")
        return whole(built), built.linears.results


def computed(linears: str, case: Case, *marks: pytest.MarkDecorator) -> pytest.ParameterSet:
    return pytest.param(case, linears, id=f"{case.name}-{linears}", marks=marks)


@pytest.mark.parametrize(
    ("case", "linears"),
    [
        *(computed("native", case) for case in CASES),
        *(computed("checked", case, *([] if case in CASES[::5] else [pytest.mark.long])) for case in CASES),
    ],
)
def test_the_bits_are_those_of_plain_integers_and_scalar_kernels(case, linears):
    """Of the logits and of every Linear of every layer, computed here or elsewhere and checked; whole and in pieces."""
    folder = model_folder(case.model)
    reference, results = reference_of(folder)
    assert np.isfinite(reference).all()
    for name in _native.instruction_sets():
        for threads in (1, 2):
            with computing_with(name, threads):
                built = Built(folder, linears)
                assert np.array_equal(whole(built), reference), (name, threads)
                assert built.linears.results.keys() == results.keys()
                for place, rows in built.linears.results.items():
                    assert np.array_equal(rows, results[place]), (name, threads, place)
                assert np.array_equal(in_pieces(built), reference), (name, threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("linears", "first_bound", "most"),
    [("numpy", field_reference.THREE_DIGITS, 1e-4), ("native", field_reference.TWO_DIGITS, 5e-4)],
    ids=["rows of three digits", "as they are"],
)
def test_the_logits_are_those_of_transformers_with_the_quantised_weights(case, linears, first_bound, most):
    folder = model_folder(case.model)
    found = whole(Built(folder, linears, element="float32", first_bound=first_bound))
    expected = transformers_quantised(folder)
    assert relative_distance(found[: len(FIRST)], expected(FIRST)) < most
    assert relative_distance(found[len(FIRST) :], expected(SECOND)) < most


class RoundedCache(DynamicCache):
    """Keys and values rounded to bfloat16 as they enter it."""

    def update(self, keys, values, *arguments, **options):
        return super().update(keys.bfloat16().float(), values.bfloat16().float(), *arguments, **options)


def transformers_quantised(folder: Path, has_rounded_cache: bool = False):
    """Transformers in float32, each weight of a Linear replaced by its integers times their scale."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        # Where the embedding is tied to it, the head alone is quantised.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                integers, scales = field_reference.quantised_weights(module.weight.numpy())
                module.weight.copy_(torch.from_numpy(integers.astype(np.float32) * scales[:, None]))

    def logits(token_ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            cache = RoundedCache(config=model.config) if has_rounded_cache else None
            return model(torch.tensor([token_ids]), past_key_values=cache).logits[0].numpy()

    return logits


@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: case.name)
def test_as_shipped_the_caches_rounding_explains_the_rest(case):
    folder = model_folder(case.model)
    found = whole(Built(folder))
    # A value between two of bfloat16's may go to either by a difference in its last bits.
    assert relative_distance(found[: len(FIRST)], transformers_quantised(folder, True)(FIRST)) < 1e-2
    assert relative_distance(found[: len(FIRST)], transformers_quantised(folder)(FIRST)) < 3e-2


@pytest.fixture(scope="module")
def licence_ids(demo_model) -> list[int]:
    """The beginning of this repository's licence."""
    with contextlib.closing(Tokenizer.from_folder(demo_model)) as tokenizer:
        return tokenizer.encode((ROOT / "LICENSE").read_text())[:96]


@pytest.mark.parametrize(
    ("linears", "first_bound", "most"),
    [
        pytest.param("numpy", field_reference.THREE_DIGITS, 1e-3, marks=pytest.mark.long, id="rows of three digits"),
        pytest.param("native", field_reference.TWO_DIGITS, 1e-2, marks=pytest.mark.slow, id="as they are"),
    ],
)
def test_the_demo_models_logits_are_those_of_transformers_with_the_quantised_weights(
    demo_model, licence_ids, linears, first_bound, most
):
    built = Built(demo_model, linears, element="float32", first_bound=first_bound, limits=DEMO_LIMITS)
    found = built.logits(Chunk(0, 0, licence_ids, len(licence_ids)))
    assert relative_distance(found, transformers_quantised(demo_model)(licence_ids)) < most


@pytest.mark.parametrize(
    "linears", [pytest.param("native", marks=pytest.mark.slow), pytest.param("checked", marks=pytest.mark.long)]
)
def test_the_demo_models_bits_are_those_of_plain_integers(demo_model, licence_ids, linears):
    chunks = [Chunk(0, 0, licence_ids[:70], 70), Chunk(1, 0, licence_ids[70:], 20)]
    with computing_with("scalar", 2):
        reference = Built(demo_model, linears="numpy", limits=DEMO_LIMITS).logits(*chunks)
    assert np.array_equal(Built(demo_model, linears, limits=DEMO_LIMITS).logits(*chunks), reference)


def test_a_mode_loads_what_it_needs_and_gives_an_engine():
    folder = model_folder(CASES[0].model)
    network = Network.of(ModelSpec.from_folder(folder))
    slots = Slots(Plan.derive(network, LIMITS), None)
    with Checkpoint.open(folder) as checkpoint:
        make_engine = load_tee_only(network, checkpoint)
    rows: list[np.ndarray] = []
    for _ in range(2):
        make_engine(slots, lambda: None, Statistics()).forward(
            [Chunk(0, 0, SECOND)], lambda first, rows_: rows_.map(lambda found: rows.append(found.copy()))
        )
    assert np.array_equal(rows[0], rows[1])
