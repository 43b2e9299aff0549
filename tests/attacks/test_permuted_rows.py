"""Rows and columns in another order: numbers that are all there are put in order again.

The scheme: activations are shown whole, but their columns are permuted by a secret permutation (the weights' rows are
permuted beforehand, so products come out right), and their rows by another one. There are C! T! orders, and nobody
searches them.

The attack does not search them: of a row, the multiset of its numbers does not depend on the columns' order. Sorted,
each row is compared with the sorted rows of all tokens,

    t = argmin_t |sort(y / |y|) - sort(u_t)|

which gives the tokens of the prompt from the first Linear's rows (`test_prompt_from_activations`), and not their order.
Deeper rows have it: what the second layer reads at position n depends on tokens 0 .. n, and on no later one. So whoever
knows tokens 0 .. n-1 computes that row for each of V tokens at n by the public model, and looks for the one that is
there, sorted: T V rows computed for a prompt of T tokens, in place of V^T. Neither order is a secret then.

Source: Thomas et al., "An Attack to Break Permutation-Based Private Third-Party Inference Schemes for LLMs" (arXiv
    2505.18332), against PermLLM, STIP and Centaur: this is its search with exact candidates.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from crossing import PROMPT, VOCABULARY, Rows, conversation, in_place, model, table
from models import transformers_model

# The first Linear of the second layer, and as much of the prompt as its attack is run on.
SECOND_LAYER = 4
BEGINNING = PROMPT[:16]
# Of a choice of 16 tokens, k or more are guessed at their places with probability at most C(16, k) / 242^k: 5e-7.
CHANCE = 4


def permuted(rows: Rows, seed: int) -> Rows:
    """What the scheme lets cross."""
    random = np.random.default_rng(seed)
    return rows[random.permutation(len(rows))][:, random.permutation(rows.shape[1])]


def in_order_of_size(rows: Rows) -> Rows:
    return np.sort(rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-30), axis=1)


def distances(rows: Rows, others: Rows) -> Rows:
    """Between rows whose columns have any order. Shapes: [T, C], [V, C] -> [T, V]."""
    first, second = in_order_of_size(rows), in_order_of_size(others)
    squares: Rows = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return squares


def tokens_of(rows: Rows) -> list[int]:
    """The token of each row of the first Linear."""
    found: list[int] = distances(rows, table().directions).argmin(axis=1).tolist()
    return found


def candidates(beginning: list[int]) -> Rows:
    """What the second layer reads at the next position, for each token there. Shapes: [V, C]."""
    network = transformers_model(model(), torch.float32, "eager").model
    tokens = torch.tensor([[*beginning, token] for token in range(VOCABULARY)])
    with torch.inference_mode():
        hidden = network(tokens, output_hidden_states=True, use_cache=False).hidden_states[1]
        rows: Rows = network.layers[1].input_layernorm(hidden[:, -1]).numpy()
    return rows


def prompt_of(rows: Rows) -> list[int]:
    """The tokens in their order, of the second layer's rows in any."""
    found: list[int] = []
    left = list(range(len(rows)))
    for _ in range(len(rows)):
        apart = distances(rows[left], candidates(found))
        row, token = np.unravel_index(apart.argmin(), apart.shape)
        found.append(int(token))
        del left[row]
    return found


@pytest.mark.parametrize("mode", ["plain", "verified"])
def test_tokens_are_found_whatever_the_order_of_rows_and_columns(mode):
    """As they cross, and as the scheme would have them cross: all tokens of the prompt, each once."""
    rows = conversation(mode).prompt_rows()
    assert in_place(tokens_of(rows)) == len(PROMPT)
    assert in_place(sorted(tokens_of(permuted(rows, 1))), sorted(PROMPT)) == len(PROMPT)


def test_deeper_rows_have_the_order():
    """Of the verified mode's rows, which are those of weights in int8: the candidates, in float32, are near enough."""
    rows = conversation("verified").rows(SECOND_LAYER)[: len(BEGINNING)]
    assert in_place(prompt_of(permuted(rows, 2)), BEGINNING) == len(BEGINNING)


def test_in_blinded_chance_is_left():
    seen = conversation("blinded")
    assert in_place(tokens_of(seen.prompt_rows())[: len(BEGINNING)], BEGINNING) < CHANCE
    assert in_place(prompt_of(seen.rows(SECOND_LAYER)[: len(BEGINNING)]), BEGINNING) < CHANCE
