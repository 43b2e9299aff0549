"""Rows that are scaled, plus a multiple of one row that all share: the shared row is found, and is then no mask.

The scheme: the rows of a call are mixed by M = D + a b^T, D diagonal, so that

    M X = D X + a (b^T X),    row i of it:  y_i = d_i x_i + a_i c,    c = b^T X

and the TEE takes M away from (M X) W by the formula of Sherman and Morrison. Every y_i is a mixture of all rows of the
call, and M is as good as it looks: no x_i is in it alone. But c is the same for all rows.

The attack: for the token t that row i is of, c lies in the plane of y_i and u_t (`test_prompt_from_activations`),
whatever d_i, a_i and b are. For two rows i, j and all pairs of tokens t, t', two planes have a direction in common
where both tokens are right, and else not: planes of 72 dimensions do not meet by chance. With e_1, e_2 an orthonormal
basis of each and G the 2 x 2 matrix of the bases' products, that is

    (1 - s_1^2) (1 - s_2^2) = 1 - |G|^2 + det(G)^2 = 0,    s_1, s_2 the cosines of the planes' angles

a formula of each pair, V^2 pairs. c is the common direction; orthogonal to c, y_i is d_i x_i, and the nearest token
names it. One call is enough. It does not matter whether D, a, b are new for each call, drawn once, or shared by the
sequences of a batch, each of which has a c of its own.

Source: `MX = DX + alpha (beta^T X)` of github.com/amoncjj/TSQP, `tee_gpu/tee_runner_ours.py`, whose distributions are
    used here; the attack is derived above. GELO (arXiv 2603.05035) mixes the rows of a call by a full random matrix
    instead; then there is no common direction, and still the rows span what the activations span.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from crossing import CHANCE, PROMPT, Rows, conversation, in_place, table

# So many pairs of rows, each with its direction; the one that explains all rows best is taken.
PAIRS = 8


def masked(x: Rows, d: Rows, a: Rows, b: Rows) -> Rows:
    """What the scheme lets cross. Shapes: x [..., T, C]; d, a, b [T]."""
    shared = np.einsum("t,...tc->...c", b, x)
    return d[:, None] * x + a[:, None] * shared[..., None, :]


def drawn(rows: int, seed: int) -> tuple[Rows, Rows, Rows]:
    random = np.random.default_rng(seed)
    d, a, b = random.standard_normal((3, rows), np.float32)
    return d + 2, a, b


def of_length_one(rows: Rows) -> Rows:
    unit: Rows = rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + 1e-30)
    return unit


def without(rows: Rows, direction: Rows) -> Rows:
    rest: Rows = rows - np.multiply.outer(rows @ direction, direction)
    return rest


def common_direction(first: Rows, second: Rows) -> Rows:
    """Of the planes of one row and a token each, and of another row and another token, the direction of those two that
    come nearest to having one in common. Shapes: [C], [C] -> [C]."""
    units = table().directions
    e, f = of_length_one(first), of_length_one(second)
    # The second vector of each plane's basis, for each token.
    e_t, f_t = of_length_one(without(units, e)), of_length_one(without(units, f))
    g11, g12, g21, g22 = e @ f, (f_t @ e)[None, :], (e_t @ f)[:, None], e_t @ f_t.T
    apart = 1 - (g11**2 + g12**2 + g21**2 + g22**2) + (g11 * g22 - g12 * g21) ** 2
    # Two planes of one token have that token's direction in common.
    np.fill_diagonal(apart, np.inf)
    t, u = np.unravel_index(np.argmin(apart), apart.shape)
    g = np.array([[g11, g12[0, u]], [g21[t, 0], g22[t, u]]])
    weights = np.linalg.svd(g)[0][:, 0]
    direction: Rows = weights[0] * e + weights[1] * e_t[t]
    return direction


def attack(rows: Rows) -> list[int]:
    """The token of each row. Shapes: [T, C]."""
    rows = of_length_one(rows)

    def tries() -> Iterator[tuple[float, list[int]]]:
        directions = [common_direction(rows[2 * pair], rows[2 * pair + 1]) for pair in range(PAIRS)]
        # That nothing is shared is tried too.
        for c in [np.zeros(rows.shape[1], np.float32), *directions]:
            likeness = np.abs(of_length_one(without(rows, c)) @ of_length_one(without(table().directions, c)).T)
            yield float(likeness.max(axis=1).mean()), likeness.argmax(axis=1).tolist()

    # Of those that explain them as well, the first: what is not shared is not to be taken away.
    return max(tries(), key=lambda found: round(found[0], 2))[1]


@pytest.mark.parametrize("mode", ["plain", "verified"])
def test_rows_in_clear_are_tokens(mode):
    """They are rows whose a_i are zero."""
    assert in_place(attack(conversation(mode).prompt_rows())) == len(PROMPT)


def test_the_shared_row_is_found_and_is_no_mask():
    x = conversation("plain").prompt_rows()
    assert in_place(attack(masked(x, *drawn(len(x), 1)))) == len(PROMPT)


def test_sequences_of_a_batch_under_one_mask_are_each_found():
    x = conversation("plain").prompt_rows()
    batch = np.stack([x, x[::-1]])
    first, second = masked(batch, *drawn(len(x), 2))
    assert in_place(attack(first)) == len(PROMPT)
    assert in_place(attack(second), PROMPT[::-1]) == len(PROMPT)


def test_in_blinded_chance_is_left():
    assert in_place(attack(conversation("blinded").prompt_rows())) < CHANCE
