"""How many floating-point operations a prefill takes, for its growth to be read against."""

from __future__ import annotations

from tsqp_shm.model.network import Network


def prefill_flops(network: Network, tokens: int) -> int:
    """Multiplications and additions of every product: Linears of all rows, the last row's logits, and attention over
    the keys that each row sees; what the TEE computes between them is left aside."""
    weights = sum(linear.parameters for layer in network.layers for linear in layer.linears)
    linears = 2 * weights * tokens + 2 * network.lm_head.parameters
    # Scores and context: a multiplication and an addition each, for every pair, head and dimension.
    of_layers = (layer.attention for layer in network.layers)
    return linears + sum(4 * attention.q_width * _pairs(tokens, attention.window) for attention in of_layers)


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a row and a key that it sees, itself included."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window
