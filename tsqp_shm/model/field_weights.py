"""The Linears of a network as the protected modes compute with them: weights in int8, a scale for each output.

Source: `native/field/field.h`.
"""

from __future__ import annotations

import numpy as np

from tsqp_shm import _native
from tsqp_shm.errors import UnsupportedModel
from tsqp_shm.model.network import Linear
from tsqp_shm.model.weights import Checkpoint, Tensor

# The order of the field in which products cross and are checked: a prime, for the checks.
FIELD = 2**31 - 1
# More inputs could wrap the sum of one digit's products.
MAX_INPUTS = 66_311
# Outputs and inputs are padded to whole panels of so many.
_PANEL = 64


def load_field_linear(checkpoint: Checkpoint, linear: Linear) -> _native.FieldLinear:
    """Quantises a Linear's weights, part by part; its bias stays float32.

    Raises:
        ModelFileError: a tensor is missing or has another shape.
        UnsupportedModel: it has more inputs than a product can sum, or a weight that is no finite number.
    """
    if linear.inputs > MAX_INPUTS:
        raise UnsupportedModel(linear.parts[0].weight, f"{linear.inputs} inputs", f"at most {MAX_INPUTS}")
    loaded = _native.FieldLinear(linear.outputs, linear.inputs)
    first, biases = 0, []
    for part in linear.parts:
        tensor = checkpoint.tensor(part.weight, (part.rows, linear.inputs))
        try:
            loaded.set_rows(first, tensor.data if tensor.dtype == "BF16" else tensor.to_float32())
        except ValueError:
            # Its shape is the config's: what is left to be refused are NaN and infinities.
            raise _not_finite(part.weight) from None
        if part.bias is not None:
            biases.append(require_finite(checkpoint.tensor(part.bias, (part.rows,))).to_float32())
        first += part.rows
    if biases:
        loaded.set_bias(np.concatenate(biases))
    return loaded


def packed_bytes(linear: Linear) -> tuple[int, int]:
    """What a loaded Linear takes: its weights, and of each output a scale, two sums of its weights, and a bias where it
    has one."""
    outputs = _padded(linear.outputs)
    words = 3 if linear.parts[0].bias is None else 4
    return outputs * _padded(linear.inputs), outputs * words * np.dtype(np.float32).itemsize


def require_finite(tensor: Tensor) -> Tensor:
    """Returns the tensor.

    Raises:
        UnsupportedModel: it holds a NaN or an infinity, in float32.
    """
    # Of bfloat16, whose bits these are, no float32 copy is made.
    is_finite = (tensor.data & 0x7F80 != 0x7F80) if tensor.dtype == "BF16" else np.isfinite(tensor.to_float32())
    if not is_finite.all():
        raise _not_finite(tensor.name)
    return tensor


def _not_finite(name: str) -> UnsupportedModel:
    return UnsupportedModel(name, "a NaN or an infinity", "finite weights")


def _padded(size: int) -> int:
    return -(-size // _PANEL) * _PANEL
