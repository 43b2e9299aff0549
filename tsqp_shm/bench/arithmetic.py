"""How many floating-point operations a prefill takes, for its growth to be read against."""

from __future__ import annotations

from tsqp_shm.model.spec import ModelSpec


def prefill_flops(spec: ModelSpec, tokens: int) -> int:
    """Multiplications and additions of every product: Linears of all rows, the last row's logits, and attention over
    the keys that each row sees; what the TEE computes between them is left aside."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    weights = spec.hidden_size * (2 * queries + 2 * keys) + 3 * spec.hidden_size * spec.intermediate_size
    linears = 2 * spec.num_layers * weights * tokens + 2 * spec.vocab_size * spec.hidden_size
    # Scores and context: a multiplication and an addition each, for every pair, head and dimension.
    pairs = sum(_pairs(tokens, window) for window in spec.windows)
    return linears + 4 * queries * pairs


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a row and a key that it sees, itself included."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window
