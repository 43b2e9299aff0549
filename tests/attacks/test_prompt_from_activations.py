"""The prompt, from the rows that the first Linear multiplies: of `plain` and of `verified` all of it.

A token t enters the model as row e_t of the embedding table, which is public. What the first Linear reads of it is

    x = g * e_t / sqrt(mean(e_t^2) + eps)

with g the first norm's weight: a public vector for each t, and no other token has a part in it. In `plain` x crosses
as it is. In `verified` it crosses as m = rint(s x) mod p, and the row's scale s > 0 stays in the TEE; centred, m is s x
but for at most a half in each element, and a direction does not depend on s. With u_t = x_t / |x_t|, computed once for
the whole vocabulary,

    t = argmax_t <m, u_t>

so a row is a token, at the cost of one product of rows and table. No model is trained for it, and the rows of decode
give the answer's tokens in the same way.

In `blinded` it crosses as m = rint(s x) - r mod p with r uniform, so m is uniform whatever x is, and the same search
finds a token that has nothing to do with it: one row in as many as there are tokens, by chance.

Source: Thomas et al., "An Attack to Break Permutation-Based Private Third-Party Inference Schemes for LLMs" (arXiv
    2505.18332) match hidden states against those of the vocabulary, layer by layer; here it is done at the first
    product, where nothing of earlier tokens has to be known.
"""

from __future__ import annotations

import numpy as np
import pytest
from crossing import CHANCE, FIELD, PROMPT, conversation, in_place, table
from read_arena import centred


@pytest.mark.parametrize("mode", ["plain", "verified"])
def test_what_crosses_in_clear_is_the_conversation(mode):
    """All of the prompt, and of the answer all but the last token, which enters no pass."""
    seen = conversation(mode)
    said = [*PROMPT, *seen.answer[:-1]]
    assert in_place(table().nearest(seen.rows()), said) == len(said)


def test_in_blinded_chance_is_left():
    seen = conversation("blinded")
    assert len(seen.rows()) == len(PROMPT) + len(seen.answer) - 1
    assert in_place(table().nearest(seen.prompt_rows())) < CHANCE


def test_of_uniform_words_chance_is_left():
    """So the attack can fail: what it takes from the rows it takes from the activations in them."""
    words = np.random.default_rng(5).integers(0, FIELD, conversation("verified").rows().shape, np.uint32)
    assert in_place(table().nearest(centred(words)[: len(PROMPT)])) < CHANCE
