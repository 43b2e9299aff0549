"""Which of two prompts was asked, told by a trained classifier from all words that crossed: in `blinded`, by chance.

The game of the claim (docs/threat-model.md, claim 21), with the adversary who reads and learns: he chooses two prompts
of one length, sees as many conversations of each as he likes, trains on one half which word means what, and is judged
on the other half by the area under his curve (AUC): the probability that he ranks a conversation of the first prompt
above one of the second. He also plays against a simulator that draws the words and knows lengths alone. An area of 1/2
is guessing; of n judged pairs whose order is a guess its deviation is sqrt((2 n + 1) / (12 n^2)) (Mann and Whitney).

In `verified` he is never wrong after a hundred pairs, so the classifier learns what there is to learn.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from crossing import FIELD, watched
from models import RandomModel, model_folder

from tsqp_shm import SamplingParams

PROMPTS = ([3, 50], [200, 7])
PARAMS = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0)
MODEL = RandomModel("llama", {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16})
AT_ONCE = 64
LIMITS = {"max_num_seqs": AT_ONCE, "max_batch_tokens": 2 * AT_ONCE}
# One of four areas lies so many deviations from guessing with probability 1e-6.
DEVIATIONS = 5.158
EPOCHS, AT_A_TIME, HIDDEN = 12, 50, 32

Conversations = npt.NDArray[np.uint32]


def conversations(mode: str, pairs: int) -> tuple[Conversations, Conversations]:
    """All words that cross in each, of both prompts. Shapes: [pairs, words] each."""
    seen = watched(model_folder(MODEL), mode, list(PROMPTS) * pairs, PARAMS, **LIMITS)
    # Rows are in the order of requests, two of a prompt, and one before lm_head.
    words = np.concatenate([rows.reshape(2 * pairs, -1) for _, rows in sorted(seen.inputs.items())], axis=1)
    return words[::2], words[1::2]


def features(words: Conversations) -> torch.Tensor:
    """Of each word how large it is, and its last byte, which its size does not show."""
    size = words / np.float32(FIELD)
    last = (words & 255) / np.float32(255)
    return torch.from_numpy(np.concatenate([size, last], axis=1).astype(np.float32) - np.float32(0.5)) * math.sqrt(12)


def trained(first: torch.Tensor, second: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(first.shape[1], HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 1), torch.nn.Flatten(0)
    )
    x = torch.cat([first, second])
    labels = torch.cat([torch.ones(len(first)), torch.zeros(len(second))])
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.1)
    for _ in range(EPOCHS):
        for some in torch.randperm(len(x)).split(AT_A_TIME):
            optimiser.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(network(x[some]), labels[some]).backward()
            optimiser.step()
    return network


def area(of_first: torch.Tensor, of_second: torch.Tensor) -> float:
    """The share of pairs whose scores are in the right order."""
    ranks = torch.cat([of_first, of_second]).argsort().argsort()[: len(of_first)].double() + 1
    count = len(of_first)
    return float((ranks.sum() - count * (count + 1) / 2) / (count * len(of_second)))


def judged(first: Conversations, second: Conversations) -> list[float]:
    """The areas of two classifiers, each trained on one half and judged on the other: every pair is judged once."""
    first_x, second_x = features(first), features(second)
    half = len(first) // 2
    areas = []
    for train, judge in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        network = trained(first_x[train], second_x[train])
        with torch.inference_mode():
            areas.append(area(network(first_x[judge]), network(second_x[judge])))
    print(f"{len(first):,} pairs of {first.shape[1]:,} words: AUC {areas[0]:.4f} and {areas[1]:.4f}")
    return areas


def simulated(like: Conversations) -> Conversations:
    """By who knows lengths alone: drawn anew each time, as words of a seed could lie to one side of the others."""
    return np.random.default_rng().integers(0, FIELD, like.shape, np.uint32)


def assert_guesses(areas: list[float], pairs: int) -> None:
    count = pairs // 2
    interval = DEVIATIONS * math.sqrt((2 * count + 1) / (12 * count**2))
    print(f"guessing is 0.5 +- {interval:.4f}")
    assert all(abs(found - 0.5) < interval for found in areas)


@pytest.mark.parametrize("pairs", [100, pytest.param(10_000, marks=pytest.mark.long)])
def test_in_blinded_neither_two_prompts_nor_a_simulation_are_told_apart(pairs):
    first, second = conversations("blinded", pairs)
    assert_guesses(judged(first, second), pairs)
    assert_guesses(judged(first, simulated(first)), pairs)


@pytest.mark.parametrize("pairs", [100, pytest.param(10_000, marks=pytest.mark.long)])
def test_in_verified_both_are(pairs):
    first, second = conversations("verified", pairs)
    assert min(judged(first, second)) > 0.999
    assert min(judged(first, simulated(first))) > 0.999


def test_uniform_words_are_not():
    """So what a classifier finds lies in the words, and not in how it is judged."""
    words = simulated(np.zeros((200, 300), np.uint32))
    assert_guesses(judged(words[:100], words[100:]), 100)
