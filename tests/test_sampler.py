"""The sampler: its distribution, its seeds, and that untrusted logits never lead out of the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tsqp_shm.errors import ProtocolError
from tsqp_shm.tee.sampler import Sampler
from tsqp_shm.tee.sampling_params import SamplingParams

VOCAB = 16
LOGITS = np.random.default_rng(3).normal(0, 2, VOCAB).astype(np.float32)


def softmax(logits, temperature=1.0):
    scores = logits.astype(np.float64) / temperature
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def draw(params: dict, count: int = 20_000, logits: np.ndarray = LOGITS) -> np.ndarray:
    """How often each token is drawn."""
    sampler = Sampler(SamplingParams(seed=11, **params))
    tokens = [sampler.sample(logits, []) for _ in range(count)]
    return np.bincount(tokens, minlength=len(logits))


def assert_drawn_from(expected: np.ndarray, params: dict) -> None:
    """Pearson's chi-squared, at a level that a right sampler fails once in 10,000 seeds; the seed is fixed."""
    counts = draw(params)
    possible = expected > 0
    assert not counts[~possible].any()
    expected_counts = expected[possible] * counts.sum()
    likely = expected_counts >= 5
    statistic = np.sum((counts[possible] - expected_counts)[likely] ** 2 / expected_counts[likely])
    degrees = max(1, likely.sum() - 1)
    # Wilson and Hilferty's approximation of the quantile.
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.72 * np.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < quantile


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_sharpens_and_flattens_the_softmax(temperature):
    assert_drawn_from(softmax(LOGITS, temperature), {"temperature": temperature})


@pytest.mark.parametrize("top_k", [1, 2, 5, VOCAB, VOCAB + 7])
def test_top_k_draws_among_the_likeliest(top_k):
    expected = softmax(LOGITS)
    expected[np.argsort(-LOGITS)[top_k:]] = 0
    assert_drawn_from(expected / expected.sum(), {"temperature": 1.0, "top_k": top_k})


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.7, 0.95, 1.0])
def test_top_p_draws_among_the_fewest_tokens_that_reach_it(top_p):
    expected = softmax(LOGITS)
    order = np.argsort(-LOGITS)
    cumulative = np.cumsum(expected[order])
    kept = 1 + int(np.sum(cumulative < top_p - 1e-9))
    expected[order[kept:]] = 0
    assert_drawn_from(expected / expected.sum(), {"temperature": 1.0, "top_p": top_p})


def test_top_p_applies_to_what_top_k_leaves():
    order = np.argsort(-LOGITS)
    among = softmax(LOGITS)
    among[order[4:]] = 0
    among /= among.sum()
    kept = 1 + int(np.sum(np.cumsum(among[order]) < 0.6))
    among[order[kept:]] = 0
    assert_drawn_from(among / among.sum(), {"temperature": 1.0, "top_k": 4, "top_p": 0.6})


def test_transformers_keeps_the_same_tokens():
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rows = np.random.default_rng(5).normal(0, 3, (20, 100)).astype(np.float32)
    for seed, logits in enumerate(rows):
        scores = torch.tensor(logits)[None]
        for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(30), TopPLogitsWarper(0.9)):
            scores = warper(None, scores)
        kept = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
        params = SamplingParams(temperature=0.8, top_k=30, top_p=0.9, seed=seed)
        sampler = Sampler(params)
        assert {sampler.sample(logits, []) for _ in range(300)} <= kept


def test_temperature_zero_and_top_k_one_take_the_likeliest():
    likeliest = int(LOGITS.argmax())
    assert Sampler(SamplingParams()).sample(LOGITS, []) == likeliest
    assert set(np.flatnonzero(draw({"temperature": 1.5, "top_k": 1}, 50))) == {likeliest}


@given(st.floats(1e-310, 1e-30), hnp.arrays(np.float32, VOCAB, elements=st.floats(-100, 100, width=32)))
def test_a_tiny_temperature_takes_the_likeliest(temperature, logits):
    token = Sampler(SamplingParams(temperature=temperature)).sample(logits, [])
    # Logits may lie closer than the temperature; exp(-800) is no probability any more.
    assert float(logits.max()) - float(logits[token]) <= 800 * temperature


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 7.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    history = [3, 3, 0, 9, 15, 9]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), torch.tensor(LOGITS)[None].clone())
    theirs = theirs[0].numpy()
    before = LOGITS.copy()
    assert Sampler(SamplingParams(repetition_penalty=penalty)).sample(LOGITS, history) == theirs.argmax()
    # The whole distribution: the same draws as from their logits without a penalty.
    ours = Sampler(SamplingParams(temperature=1.0, seed=5, repetition_penalty=penalty))
    plain = Sampler(SamplingParams(temperature=1.0, seed=5))
    assert [ours.sample(LOGITS, history) for _ in range(200)] == [plain.sample(theirs, []) for _ in range(200)]
    assert np.array_equal(LOGITS, before)


def test_a_seed_repeats_and_no_seed_does_not():
    def tokens(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.sample(LOGITS, []) for _ in range(64)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


legal_params = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | st.floats(0, exclude_min=True, allow_infinity=False),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1, exclude_min=True),
    repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**64),
)
any_logits = hnp.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0]),
)


@pytest.mark.filterwarnings("error")
@given(params=legal_params, logits=any_logits, data=st.data())
def test_the_token_is_in_the_vocabulary_whatever_the_logits_are(params, logits, data):
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=8))
    token = Sampler(params).sample(logits, history)
    assert type(token) is int
    assert 0 <= token < len(logits)


@given(
    params=legal_params,
    logits=any_logits,
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    place=st.integers(0, 1000),
)
def test_a_nan_or_an_infinity_is_a_protocol_error(params, logits, bad, place):
    logits[place % len(logits)] = bad
    with pytest.raises(ProtocolError, match="logits"):
        Sampler(params).sample(logits, [])
