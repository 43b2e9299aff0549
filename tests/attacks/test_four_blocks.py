"""Operands of attention in four blocks: the pad is sent along, times one number that is soon known.

The scheme: of Q K^T both factors are activations, so no product of a pad can be made before. Pads R and S are uniform
in the field, a and b are one number each, and both factors are sent beside their scaled pads, in a secret order of
rows:

    [Q + R; a R] [K + S; b S]^T  =  [ (Q + R)(K + S)^T   b (Q + R) S^T ]
                                    [ a R (K + S)^T      a b R S^T     ]

From the four blocks the TEE has Q K^T by additions and divisions by a and b. Each row by itself is uniform, and no row
is sent twice.

The attack: two rows of the 2 T belong together, u = q + r and v = a r. With c = 1 / a,

    q = u - c v mod p

has one unknown for D numbers, and q is small: activations have some 16 bits, the field 31. A guess of q's first number
gives c = (u_1 - q_1) / v_1, and the other D - 1 numbers say whether it was right: a false one stays small in all of
them with probability (2^16 / 2^31)^(D-1). So 2^16 guesses for each partner of one row give c, which is the same for all
rows, and then every pair is told by u - c v being small: Q comes back to the last bit. The order of rows is given away
by rope: a row is that of one token at one place, and both are found by the nearest of T V public vectors. K comes back
in the same way.

In floats it is easier still: R is then normal noise, and c a quotient of sums.

Source: the attention of TwinShield (Xue et al., arXiv 2507.03278, OutAttnMult); in floats in github.com/amoncjj/TSQP,
    `tee_gpu/tee_runner_otp.py` ("embedded additive outsource"). The attack is derived above.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from crossing import CHANCE, FIELD, PROMPT, Rows, conversation, in_place, model, table
from models import transformers_model
from read_arena import centred
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# Of numbers that are hidden: two digits, as the largest here have.
LARGEST = 32_639
HEAD_DIM = 24
# As much of the prompt as the attack is run on.
BEGINNING = PROMPT[:64]

Integers = npt.NDArray[np.int64]


def queries(x: Rows, places: range) -> Rows:
    """Of the first layer's first head, by the public weights. Shapes: [T, C] -> [T, D], or [T, P, D] of each place."""
    network = transformers_model(model(), torch.float32, "eager").model
    with torch.inference_mode():
        q = network.layers[0].self_attn.q_proj(torch.from_numpy(x))[:, :HEAD_DIM]
        cos, sin = network.rotary_emb(q, torch.tensor([list(places)]))
        return apply_rotary_pos_emb(q[:, None, None], q[:, None, None], cos, sin)[0][:, 0].numpy()


def queries_in_place(x: Rows) -> Rows:
    rows = np.arange(len(x))
    every: Rows = queries(x, range(len(x)))[rows, rows]
    return every


def in_integers(rows: Rows) -> Integers:
    return np.rint(rows * (LARGEST / np.abs(rows).max())).astype(np.int64)


def blocks(q: Integers, seed: int) -> Integers:
    """What the scheme lets cross of one factor. Shapes: [T, D] -> [2 T, D], in [0, p)."""
    random = np.random.default_rng(seed)
    r = random.integers(0, FIELD, q.shape)
    a = int(random.integers(1, FIELD))
    return random.permutation(np.concatenate([(q + r) % FIELD, a * r % FIELD]))


def small(words: Integers) -> npt.NDArray[np.bool_]:
    """Which of them stand for numbers that could be activations."""
    return (words <= LARGEST) | (words >= FIELD - LARGEST)


def factor(rows: Integers) -> int | None:
    """c = 1 / a; None: no two rows belong together, or not the first to any."""
    guesses = np.arange(-LARGEST, LARGEST + 1)
    for other in rows[1:]:
        for u, v in ((rows[0], other), (other, rows[0])):
            c = (u[0] - guesses) % FIELD * pow(int(v[0]), -1, FIELD) % FIELD
            for word in range(1, len(u)):
                c = c[small((u[word] - c * v[word]) % FIELD)]
            if len(c):
                return int(c[0])
    return None


def uncovered(rows: Integers) -> Integers:
    """The rows q, in the order in which u was sent. Shapes: [2 T, D] -> [at most T, D]."""
    c = factor(rows)
    if c is None:
        return rows[:0]
    pads = rows * c % FIELD
    found = [(u - pads) % FIELD for u in rows]
    hits = [row[small(row).all(axis=1)] for row in found]
    return centred(np.concatenate(hits)).astype(np.int64)


def prompt_of(q: npt.NDArray[np.generic], length: int) -> list[int]:
    """The tokens at the places at which they are found; -1 where none is. Shapes: q [any, D]."""
    found = [-1] * length
    every = queries(table().directions, range(length)).reshape(-1, HEAD_DIM)
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    for row in q:
        token, place = divmod(int(np.argmax(every @ row.astype(np.float32))), length)
        found[place] = token
    return found


@pytest.mark.parametrize("mode", ["plain", "verified"])
def test_queries_of_rows_in_clear_are_tokens_and_places(mode):
    """Who sees x has Q, and needs no order of rows."""
    q = np.random.default_rng(1).permutation(queries_in_place(conversation(mode).rows()[: len(BEGINNING)]))
    assert in_place(prompt_of(q, len(BEGINNING)), BEGINNING) == len(BEGINNING)


def test_the_pad_that_is_sent_along_uncovers_the_queries():
    q = in_integers(queries_in_place(conversation("plain").rows()[: len(BEGINNING)]))
    found = uncovered(blocks(q, seed=2))
    assert sorted(found.tolist()) == sorted(q.tolist())
    assert in_place(prompt_of(found, len(BEGINNING)), BEGINNING) == len(BEGINNING)


def test_in_blinded_no_two_rows_belong_together():
    """Nor is a row of such words, taken for a query, that of its token."""
    words = conversation("blinded").inputs[0][: len(BEGINNING), :HEAD_DIM].astype(np.int64)
    assert len(uncovered(words)) == 0
    assert in_place(prompt_of(centred(words), len(BEGINNING)), BEGINNING) < CHANCE
