"""The native sampler against a plain one in numpy: every filter, every draw, every instruction set, the same token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm import _native

LARGEST = np.finfo(np.float32).max
UNIT = 2**30


def philox(key, counter) -> np.ndarray:
    """numpy's generator, which counts up before its first block."""
    number = (sum(int(word) << 64 * i for i, word in enumerate(counter)) - 1) % 2**256
    words = np.array([number >> 64 * i & (2**64 - 1) for i in range(4)], np.uint64)
    return np.random.Philox(key=np.array(key, np.uint64), counter=words).random_raw(4)


def weights_of(logits: np.ndarray, temperature: float) -> np.ndarray:
    """exp as float32 rounds it: what the native one may miss by 1 ULP moves no boundary of these tests."""
    factor = np.float32(min(1 / temperature, float(LARGEST)))
    with np.errstate(over="ignore", invalid="ignore"):
        distances = (logits - logits.max()) * factor
        exponentials = np.exp(distances.astype(np.float64)).astype(np.float32)
    return np.rint(exponentials.astype(np.float64) * UNIT).astype(np.uint64)


def within_f32(number: float) -> np.float32:
    return np.float32(np.clip(number, -float(LARGEST), float(LARGEST)))


def edited(logits, prompt, output, rules) -> np.ndarray:
    """The logits after everything that forbids or favours tokens, one rule after another."""
    logits = logits.copy()
    if rules.get("allowed"):
        forbidden = np.ones(len(logits), bool)
        forbidden[rules["allowed"]] = False
        logits[forbidden] = -np.inf
    for words in rules.get("bad_words", []):
        if list(output[len(output) - len(words) + 1 :]) == list(words[:-1]) and len(words) - 1 <= len(output):
            logits[words[-1]] = -np.inf
    if len(output) < rules.get("min_tokens", 0):
        logits[rules["ending"]] = -np.inf
    left = logits > -np.inf
    with np.errstate(over="ignore", divide="ignore"):
        for token, bias in rules.get("bias", []):
            if left[token]:
                logits[token] = np.clip(logits[token] + within_f32(bias), -LARGEST, LARGEST)
        repetition = within_f32(rules.get("repetition_penalty", 1.0))
        for token in {*prompt, *output} if repetition != 1 else ():
            if left[token]:
                changed = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
                logits[token] = np.clip(changed, -LARGEST, LARGEST)
        for token in set(output):
            if left[token]:
                frequency = np.float32(rules.get("frequency_penalty", 0.0)) * np.float32(list(output).count(token))
                logits[token] = np.clip(logits[token] - frequency, -LARGEST, LARGEST)
                lessened = logits[token] - np.float32(rules.get("presence_penalty", 0.0))
                logits[token] = np.clip(lessened, -LARGEST, LARGEST)
    return logits


def kept_tokens(logits, rules) -> tuple[np.ndarray, np.ndarray]:
    """What the filters leave, likeliest first, and all tokens' weights."""
    weights = weights_of(logits, rules["temperature"])
    order = np.lexsort((np.arange(len(logits)), -logits))
    if (min_p := rules.get("min_p", 0.0)) > 0:
        order = order[weights[order] >= max(1, math.ceil(min_p * UNIT))]
    if top_k := rules.get("top_k", 0):
        order = order[:top_k]
    if (top_p := rules.get("top_p", 1.0)) < 1:
        sums = np.cumsum(weights[order])
        order = order[: int(np.searchsorted(sums, max(1, math.ceil(top_p * float(sums[-1]))))) + 1]
    return order, weights


def expected_token(logits, prompt, output, rules) -> int:
    logits = edited(logits, prompt, output, rules)
    if logits.max() == -np.inf:
        return _native.NOTHING_LEFT
    if rules.get("temperature", 0.0) == 0:
        return int(np.argmax(logits))
    kept, weights = kept_tokens(logits, rules)
    kept = np.sort(kept)
    sums = np.cumsum(weights[kept])
    random = int(philox((rules.get("seed", 0), rules.get("stream", 0)), (len(output), 0, 0, 0))[0])
    return int(kept[np.searchsorted(sums, random * int(sums[-1]) >> 64, side="right")])


def sampler_after(vocab, prompt, output, rules) -> _native.TokenSampler:
    sampler = _native.TokenSampler(vocab, prompt, **rules)
    for token in output:
        sampler.grow(token)
    return sampler


def drawn(logits, prompt=(), output=(), **rules) -> int:
    sampler = sampler_after(len(logits), list(prompt), output, rules)
    return int(_native.draw_tokens(logits[None], [sampler])[0])


@st.composite
def rows(draw, max_vocab=400):
    vocab = draw(st.one_of(st.integers(1, 8), st.sampled_from([63, 64, 65, 128, 129]), st.integers(1, max_vocab)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.normal(draw(st.sampled_from([0, -40, 1e4])), draw(st.sampled_from([0, 0.1, 1, 4, 30, 1e30])), vocab)
    logits = np.clip(logits, -LARGEST, LARGEST).astype(np.float32)
    return np.round(logits) if draw(st.booleans()) else logits  # ties


@st.composite
def filters(draw):
    return {
        "temperature": draw(st.sampled_from([1e-45, 1e-3, 0.3, 1.0, 2.5, 100.0, 1e30])),
        "top_k": draw(st.sampled_from([0, 0, 1, 2, 3, 50, 10_000])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.1, 1e-9])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 1e-9, 0.02, 0.5, 1.0])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "stream": draw(st.integers(0, 5)),
    }


@given(key=st.tuples(*[st.integers(0, 2**64 - 1)] * 2), counter=st.tuples(*[st.integers(0, 2**64 - 1)] * 4))
def test_philox_is_that_of_numpy(key, counter):
    assert list(philox(key, counter)) == _native.philox(key, counter)


@given(logits=rows(), rules=filters(), position=st.integers(0, 3))
def test_filters_and_draw_are_those_of_the_plain_reference(logits, rules, position):
    output = [0] * position
    assert drawn(logits, output=output, **rules) == expected_token(logits, [], output, rules)


@given(logits=rows(), rules=filters(), data=st.data())
def test_whatever_favours_or_forbids_tokens_is_that_of_the_plain_reference(logits, rules, data):
    tokens = st.integers(0, len(logits) - 1)
    several = st.lists(tokens, max_size=6)
    prompt, output = data.draw(several), data.draw(several)
    rules |= {
        "temperature": data.draw(st.sampled_from([0.0, 1.0])),
        "allowed": sorted(set(data.draw(several))),
        "bias": list(
            data.draw(
                st.dictionaries(tokens, st.sampled_from([-100.0, 0.5, 100.0, 3e38, 1e300, -1e300]), max_size=4)
            ).items()
        ),
        "bad_words": data.draw(st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=3)),
        "min_tokens": data.draw(st.integers(0, 6)),
        "ending": data.draw(several),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3, 0.5, 1e30, 1e300, 1e-300])),
        "presence_penalty": data.draw(st.sampled_from([0.0, 1.5, -2.0])),
        "frequency_penalty": data.draw(st.sampled_from([0.0, 0.7, -2.0])),
    }
    assert drawn(logits, prompt, output, **rules) == expected_token(logits, prompt, output, rules)


@pytest.mark.parametrize("vocab", [1000, 49_152, 152_064])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("rules", [{}, {"top_k": 50}, {"top_k": 5000, "top_p": 0.95}, {"top_p": 0.9}, {"min_p": 0.05}])
def test_a_large_vocabulary_is_sampled_as_a_small_one(vocab, spread, rules):
    random = np.random.default_rng(vocab)
    logits = (random.normal(0, spread, vocab)).astype(np.float32)
    for seed in range(4):
        asked = {"temperature": 1.0, "seed": seed, **rules}
        assert drawn(logits, **asked) == expected_token(logits, [], [], asked)


def test_every_instruction_set_and_number_of_threads_draws_the_same_tokens():
    random = np.random.default_rng(5)
    logits = random.normal(0, 3, (32, 5003)).astype(np.float32)
    rules = [{"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.01}, {}, {"repetition_penalty": 1.2, "top_p": 0.99}]
    asked = [{"temperature": 0.8, "seed": row, **rules[row % len(rules)]} for row in range(32)]

    def draw() -> list:
        samplers = [_native.TokenSampler(5003, [1, 2, 3], **rules) for rules in asked]
        scores = _native.score_tokens(logits, np.arange(32, dtype=np.int32), 7)
        return [_native.draw_tokens(logits, samplers).tolist(), *(part.tolist() for part in scores)]

    chosen, threads = _native.active_instruction_set(), _native.get_num_threads()
    try:
        found = []
        for name in _native.instruction_sets():
            for num_threads in (1, 3):
                _native.use_instruction_set(name)
                _native.set_num_threads(num_threads)
                found.append(draw())
    finally:
        _native.use_instruction_set(chosen)
        _native.set_num_threads(threads)
    assert all(other == found[0] for other in found)


@given(first=rows(), rules=filters(), data=st.data())
def test_a_row_is_drawn_alone_as_in_company(first, rules, data):
    others = [np.roll(first, shift) for shift in data.draw(st.lists(st.integers(0, 400), max_size=5))]
    company = np.stack([*others, first])
    samplers = [_native.TokenSampler(len(first), [], **rules) for _ in company]
    assert _native.draw_tokens(company, samplers)[-1] == drawn(first, **rules)


@given(logits=rows(), rules=filters())
def test_a_filter_leaves_the_likeliest_and_of_equal_ones_the_smallest(logits, rules):
    rules |= {"temperature": 1.0, "top_k": 1}
    assert drawn(logits, **rules) == int(np.argmax(logits))
    rules |= {"top_k": 0, "top_p": 1e-300}
    assert drawn(logits, **rules) == int(np.argmax(logits))


@pytest.mark.parametrize("rules", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 2.0}])
def test_tokens_come_as_often_as_the_softmax_of_what_is_kept_says(rules):
    logits = np.random.default_rng(3).normal(0, 2, 16).astype(np.float32)
    rules = {"temperature": 1.0, **rules}
    count = 20_000
    samplers = [_native.TokenSampler(16, [], seed=seed, **rules) for seed in range(count)]
    counts = np.bincount(_native.draw_tokens(np.tile(logits, (count, 1)), samplers), minlength=16)
    kept, _ = kept_tokens(logits, rules)
    scores = logits[kept].astype(np.float64) / rules["temperature"]
    expected = np.exp(scores - scores.max())
    expected *= count / expected.sum()
    assert counts.sum() == counts[kept].sum()
    assert_chi_squared_of(counts[kept], expected)


def test_positions_and_streams_of_one_seed_are_drawn_apart():
    """Pairs of draws of one request: neighbours in position, and in stream, come together as often as chance says."""
    logits = np.zeros(4, np.float32)
    count = 4000
    samplers = [_native.TokenSampler(4, [], temperature=1.0, seed=9, stream=stream) for stream in range(count)]
    first = _native.draw_tokens(np.tile(logits, (count, 1)), samplers)
    for sampler in samplers:
        sampler.grow(0)
    second = _native.draw_tokens(np.tile(logits, (count, 1)), samplers)
    for a, b in ((first, second), (first[:-1], first[1:])):
        pairs = np.bincount(a * 4 + b, minlength=16)
        assert_chi_squared_of(pairs, np.full(16, len(a) / 16))


def assert_chi_squared_of(counts: np.ndarray, expected: np.ndarray) -> None:
    """Pearson's, at a level that a right sampler fails once in 10,000 seeds; the seeds are fixed."""
    likely = expected >= 5
    statistic = np.sum((counts - expected)[likely] ** 2 / expected[likely])
    degrees = max(1, likely.sum() - 1)
    # Wilson and Hilferty's approximation of the quantile.
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.72 * np.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < quantile


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 64, 99])
def test_what_is_no_number_draws_nothing(value, at):
    logits = np.zeros(100, np.float32)
    logits[at] = value
    for rules in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"allowed": [5]}):
        assert drawn(logits, **rules) == _native.NOT_FINITE
    with pytest.raises(ValueError, match="finite"):
        _native.score_tokens(logits[None], np.zeros(1, np.int32), 3)


def test_rules_that_leave_no_token_say_so():
    logits = np.zeros(3, np.float32)
    assert drawn(logits, allowed=[1], bad_words=[[1]]) == _native.NOTHING_LEFT
    assert drawn(logits, allowed=[1], min_tokens=1, ending=[1], temperature=1.0) == _native.NOTHING_LEFT
    assert drawn(logits, output=[0], allowed=[1], min_tokens=1, ending=[1], temperature=1.0) == 1


@given(logits=rows(), data=st.data())
def test_log_probabilities_are_those_of_the_softmax_in_float64(logits, data):
    token, top = data.draw(st.integers(0, len(logits) - 1)), data.draw(st.integers(0, len(logits)))
    distances = logits.astype(np.float64) - float(logits.max())
    expected = distances - np.log(np.sum(np.exp(distances)))
    logprobs, ranks, top_tokens, top_logprobs = _native.score_tokens(logits[None], np.array([token], np.int32), top)
    order = np.lexsort((np.arange(len(logits)), -logits))
    assert logprobs[0] == pytest.approx(expected[token], rel=1e-6, abs=1e-5)
    assert ranks[0] == np.sum(logits >= logits[token])
    assert top_tokens[0].tolist() == order[:top].tolist()
    np.testing.assert_allclose(top_logprobs[0], expected[order[:top]], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"allowed": [2, 1]}, "allowed"),
        ({"allowed": [4]}, "allowed"),
        ({"bias": [(-1, 1.0)]}, "bias"),
        ({"bad_words": [[]]}, "bad_words"),
        ({"bad_words": [[4]]}, "bad_words"),
        ({"ending": [4]}, "ending"),
    ],
)
def test_the_native_side_refuses_what_would_lead_out_of_the_row(rules, named):
    with pytest.raises((ValueError, IndexError), match=named):
        _native.TokenSampler(4, [], **rules)
    with pytest.raises(IndexError, match="prompt"):
        _native.TokenSampler(4, [4])
    with pytest.raises(IndexError, match="token"):
        _native.TokenSampler(4, []).grow(4)
    with pytest.raises(ValueError, match="rows of 4"):
        _native.draw_tokens(np.zeros((1, 5), np.float32), [_native.TokenSampler(4, [])])
    with pytest.raises(TypeError, match="for each row"):
        _native.draw_tokens(np.zeros((1, 4), np.float32), [None])


def test_transformers_keeps_the_same_tokens():
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed, logits in enumerate(np.random.default_rng(5).normal(0, 3, (20, 100)).astype(np.float32)):
        scores = torch.tensor(logits)[None]
        rules = {"temperature": 0.8, "min_p": 0.01, "top_k": 30, "top_p": 0.9}
        for warper in (
            TemperatureLogitsWarper(0.8),
            MinPLogitsWarper(0.01),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.9),
        ):
            scores = warper(None, scores)
        kept = torch.isfinite(scores[0]).nonzero().flatten().tolist()
        samplers = [_native.TokenSampler(100, [], seed=seed, stream=stream, **rules) for stream in range(300)]
        assert set(_native.draw_tokens(np.tile(logits, (300, 1)), samplers).tolist()) <= set(kept)
        assert sorted(kept_tokens(logits, rules)[0].tolist()) == kept


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 7.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    """The whole distribution: the same draws as from their logits without a penalty."""
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(3).normal(0, 2, 16).astype(np.float32)
    prompt, output = [3, 3, 0], [9, 15, 9]
    ids = torch.tensor([prompt + output])
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.tensor(logits)[None].clone())[0].numpy()
    assert drawn(logits, prompt, output, repetition_penalty=penalty) == theirs.argmax()
    for seed in range(100):
        rules = {"temperature": 1.0, "seed": seed}
        ours = drawn(logits, prompt, output, repetition_penalty=penalty, **rules)
        assert ours == drawn(theirs, prompt, output, **rules)


@given(st.floats(1e-310, 1e-30), rows())
def test_a_tiny_temperature_takes_the_likeliest(temperature, logits):
    token = drawn(logits, temperature=temperature)
    # Logits may lie closer than the temperature; exp(-800) is no probability any more.
    assert float(logits.max()) - float(logits[token]) <= 800 * temperature
