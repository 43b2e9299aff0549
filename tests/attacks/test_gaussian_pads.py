"""Pads that are normal numbers: they hide too little, and what hides enough costs the product its digits.

The scheme: activations stay floats, the TEE sends m = x + sigma n with n normal and new for each row, gets m W, and
takes away sigma (n W), which it has made before. It looks like a one-time pad, and is none: a sum of reals is not
uniform, so m is more likely near its x than near another one.

The attack: x is one of as many vectors as there are tokens (`test_prompt_from_activations`). Of two of one length,
the nearer to m is the right one but for

    P(wrong) = Q(|x - x'| / (2 sigma)),    |x - x'| ~ sqrt(2 C), as a norm makes |x| ~ sqrt(C)

with Q the normal tail: at sigma 1 and C = 72 that is Q(6) = 1e-9 for each other token, and Q(17) at C = 576. Noise that
is as large as what it hides, in every element, hides nothing of the whole. At sigma 4 one row is not enough, but where
the same prompt is asked k times, as a system prompt is, the mean of its rows has the noise of sigma / sqrt(k). And
sigma has no room to grow: the result is a difference of numbers sigma times larger, so it has log2(sigma) bits fewer.

A field has neither trouble: x - r mod p is uniform for every x, and x W comes back exactly.

Source: the scheme as written in floats in github.com/amoncjj/TSQP, `tee_gpu/tee_runner_otp.py` (`randn_like`, sigma 1).
    Slalom (Tramer and Boneh, arXiv 1806.03287), which it is made after, quantises and draws its pads from a field.
"""

from __future__ import annotations

import numpy as np
import pytest
from crossing import CHANCE, PROMPT, Rows, conversation, in_place, table

ASKED = 16


def masked(x: Rows, sigma: float, random: np.random.Generator) -> Rows:
    """What the scheme lets cross."""
    return x + np.float32(sigma) * random.standard_normal(x.shape, np.float32)


def attack(rows: Rows) -> list[int]:
    return table().nearest(rows)


@pytest.mark.parametrize("mode", ["plain", "verified"])
def test_rows_in_clear_are_tokens(mode):
    assert in_place(attack(conversation(mode).prompt_rows())) == len(PROMPT)


def test_noise_as_large_as_the_activations_hides_nothing():
    m = masked(conversation("plain").prompt_rows(), 1, np.random.default_rng(1))
    assert in_place(attack(m)) == len(PROMPT)


def test_more_noise_is_averaged_away_where_a_prompt_is_asked_again():
    x, random = conversation("plain").prompt_rows(), np.random.default_rng(2)
    once = in_place(attack(masked(x, 4, random)))
    often = in_place(attack(np.mean([masked(x, 4, random) for _ in range(ASKED)], axis=0)))
    # One row is noise for the most part, and still gives away more than a guess.
    assert CHANCE < once < len(PROMPT) / 2
    assert often == len(PROMPT)


def test_noise_that_hides_costs_the_result_its_digits():
    """Of x W, in floats of 32 bits: by the noise it loses what the noise is larger."""
    x, random = conversation("plain").prompt_rows(), np.random.default_rng(3)
    weights = random.standard_normal((x.shape[1], 32), np.float32)
    exact = x.astype(np.float64) @ weights

    def error(sigma: float) -> float:
        noise = np.float32(sigma) * random.standard_normal(x.shape, np.float32)
        result = (x + noise) @ weights - noise @ weights
        return float(np.abs(result - exact).max() / exact.std())

    errors = {sigma: error(sigma) for sigma in (1, 1e3, 1e6)}
    print("largest error of a result, in its deviations:", errors)
    assert errors[1] < 1e-5
    assert errors[1e6] > 1e4 * errors[1]


def test_in_blinded_chance_is_left():
    assert in_place(attack(conversation("blinded").prompt_rows())) < CHANCE
