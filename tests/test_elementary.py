"""The elementary functions of our own: near enough to exact, and the same bits whatever the processor can do."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
from digests import ROPES, digest_of_draws, digest_of_tables, numpy_features
from models import RandomModel, model_folder

from tsqp_shm import _native
from tsqp_shm.modes import MODES

EXACT = mpmath.mp.clone()
EXACT.prec = 200

# SHA-256 over the cosines and sines of 4,096 positions, heads of 64: of every machine, so this may change only where
# the tables are to.
TABLES = {
    "smollm2": "d1424b5cbc95085e76eb376145038b4d5682f054f36c3d75e5c8eac6414720f4",
    "qwen2": "13c9d4c9b806c4a6e589b5d3a87ee1c0f6daefdb597194803981de7094065a50",
    "linear": "917cbd6844f98fb367dfa18bccc88a0e2dc075d836e591dde4b18a160b13baf9",
    "llama3": "d8a1abe2002449e7c6aa253430d9c03b48634eac669ed771ef1c849acc0fdd97",
    "yarn": "c44623e97ad4685b162cd48656cb0845b3669907ab3c41be47481df793343957",
}

# What plain's GPU process computes by a library is that library's; each other mode promises its bits.
PROMISED_MODES = [mode for mode in MODES if mode != "plain"]


def processors() -> list[pytest.param]:
    """Environments that make this processor look like others, to our kernels and to numpy."""
    environments = [pytest.param({"TSQP_SHM_ISA": isa}, id=isa) for isa in _native.instruction_sets()]
    if numpy_features():
        environments.append(pytest.param({"NPY_DISABLE_CPU_FEATURES": " ".join(numpy_features())}, id="bare numpy"))
    return environments


def elsewhere(environment: dict[str, str], expression: str) -> list[str]:
    """What an expression of `digests` is, as words, in a process whose processor looks so."""
    program = f"from digests import *; print({expression}); print(*numpy_features())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path)), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found, features = done.stdout.splitlines()
    assert "NPY_DISABLE_CPU_FEATURES" not in environment or not features
    return found.split()


def off_in_ulp_of_float32(found: np.float32, exact: mpmath.mpf) -> float:
    exponent = max(int(EXACT.floor(EXACT.log(abs(exact), 2))), -126) if exact else -126
    return float(abs(EXACT.mpf(float(found)) - exact) * EXACT.mpf(2) ** (23 - exponent))


def angles() -> np.ndarray:
    """Of real tables at any position, of any size that is allowed, and next to multiples of a quarter turn."""
    random = np.random.default_rng(1)
    frequencies = np.concatenate([1 / theta ** (np.arange(32) / 32) for theta in (1e4, 1e5, 5e5, 1e6)])
    real = random.choice(frequencies, 6000).astype(np.float32) * random.integers(0, 1 << 20, 6000).astype(np.float32)
    any_size = np.exp2(random.uniform(-30, 38.9, 3000)).astype(np.float32)
    quarters = np.rint(np.exp2(random.uniform(0, 38, 3000)))
    return np.concatenate([real, any_size, (quarters * (math.pi / 2)).astype(np.float32)])


def test_cosines_and_sines_are_rounded_once():
    """The angle of position 1 is the frequency itself."""
    frequencies = angles()
    cosines, sines = _native.rope_tables(frequencies, 2, 1.0)
    worst = 0.0
    for angle, cosine, sine in zip(frequencies, cosines[1], sines[1], strict=True):
        worst = max(worst, off_in_ulp_of_float32(cosine, EXACT.cos(EXACT.mpf(float(angle)))))
        worst = max(worst, off_in_ulp_of_float32(sine, EXACT.sin(EXACT.mpf(float(angle)))))
    assert worst <= 0.50001


def test_the_tables_of_a_negative_frequency_turn_the_other_way():
    cosines, sines = _native.rope_tables(np.array([0.3], np.float32), 100, 1.0)
    turned_cosines, turned_sines = _native.rope_tables(np.array([-0.3], np.float32), 100, 1.0)
    assert np.array_equal(cosines, turned_cosines)
    assert np.array_equal(sines, -turned_sines)


def test_powers_are_within_one_ulp_of_float64():
    random = np.random.default_rng(2)
    for base, exponent in zip(np.exp(random.uniform(0, 69, 3000)), random.uniform(-1, 1, 3000), strict=True):
        exact = EXACT.power(EXACT.mpf(float(base)), EXACT.mpf(float(exponent)))
        found = _native.power(float(base), float(exponent))
        assert abs(EXACT.mpf(found) - exact) <= math.ulp(found)


def test_logarithms_are_within_one_ulp_of_float64():
    random = np.random.default_rng(3)
    for x in np.concatenate([np.exp(random.uniform(-600, 600, 3000)), 1 + random.uniform(-1e-3, 1e-3, 1000)]):
        found = _native.logarithm(float(x))
        assert abs(EXACT.mpf(found) - EXACT.log(EXACT.mpf(float(x)))) <= 0.55 * math.ulp(found)


def test_exact_values_are_exact():
    assert _native.logarithm(1.0) == 0.0
    assert [_native.power(2.0, exponent) for exponent in (-3.0, 0.0, 1.0, 10.0)] == [0.125, 1.0, 2.0, 1024.0]


@pytest.mark.parametrize("x", [0.0, -1.0, math.inf, math.nan, 5e-324])
def test_no_logarithm_is_given_of_what_has_none(x):
    with pytest.raises(ValueError, match="x: expected a positive, normal number"):
        _native.logarithm(x)
    with pytest.raises(ValueError, match="base: expected a positive, normal number"):
        _native.power(x, 1.0)


@pytest.mark.parametrize("exponent", [400.0, -400.0, math.inf, math.nan])
def test_no_power_is_given_beyond_normal_numbers(exponent):
    with pytest.raises(ValueError, match="exponent: expected a result"):
        _native.power(10.0, exponent)


@pytest.mark.parametrize("frequency", [2e6, math.inf, math.nan])
def test_no_tables_are_made_of_larger_angles(frequency):
    with pytest.raises(ValueError, match=r"inverse_frequencies\[1\]: expected angles of 2\^40 at most"):
        _native.rope_tables(np.array([1.0, frequency], np.float32), 1 << 20, 1.0)


@pytest.mark.parametrize("name", ROPES)
def test_the_tables_have_the_bits_that_every_machine_gives(name):
    assert digest_of_tables(ROPES[name]) == TABLES[name]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_tables_do_not_depend_on_the_number_of_threads(num_threads):
    _native.set_num_threads(num_threads)
    try:
        assert digest_of_tables(ROPES["smollm2"]) == TABLES["smollm2"]
    finally:
        _native.set_num_threads(1)


@functools.cache
def digests_here() -> list[str]:
    return [*map(digest_of_tables, ROPES.values()), digest_of_draws()]


@pytest.mark.parametrize("environment", processors())
def test_tables_and_draws_do_not_depend_on_what_the_processor_can_do(environment):
    expression = "*map(digest_of_tables, ROPES.values()), digest_of_draws()"
    assert elsewhere(environment, expression) == digests_here()


@functools.cache
def run_digest_here(mode: str) -> str:
    (found,) = elsewhere({}, f"digest_of_run({str(small_model())!r}, {mode!r})")
    return found


def small_model() -> Path:
    return model_folder(RandomModel("llama"))


@pytest.mark.parametrize("mode", PROMISED_MODES)
@pytest.mark.parametrize("environment", processors())
def test_logits_and_drawn_tokens_do_not_depend_on_what_the_processor_can_do(environment, mode):
    found = elsewhere(environment, f"digest_of_run({str(small_model())!r}, {mode!r})")
    assert found == [run_digest_here(mode)]
