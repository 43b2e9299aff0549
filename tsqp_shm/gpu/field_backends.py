"""Exact products of digits with int8 weights by the tensor library, as a device has them fast.

Neither has ever run on a card. On the CPU, where tests run them, `torch._int_mm` is the same call, and bfloat16 digits
are multiplied in float32. `gpu.field_self_test` runs before either serves.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import pad

# Of torch._int_mm on CUDA: more than 16 rows, the other sizes in eights.
_FEWEST_ROWS = 17
_SIZE_STEP = 8
# 128 * 127 * 1,024 < 2^24: a float32 sum of so many products is exact, in whatever order.
_EXACT_DEPTH = 1024
# Compute capabilities: the first with tensor cores for int8, and those where these are a fraction of bfloat16's.
_FIRST_INT8 = (7, 5)
_SLOW_INT8 = ((10, 3),)


class Backend(Protocol):
    """Attributes:
    arithmetic: for people.
    """

    @property
    def arithmetic(self) -> str: ...

    def weight_bytes(self, outputs: int, inputs: int) -> int:
        """What a packed weight takes."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Shapes: weight [N, K] int8, within +-127, on the device."""

    def sums(self, digits: torch.Tensor, packed: torch.Tensor, outputs: int) -> torch.Tensor:
        """Shapes: digits [D, K] int8; result [D, outputs] int32, exact."""


class Int8Backend:
    arithmetic = "int8"

    def weight_bytes(self, outputs: int, inputs: int) -> int:
        return _padded(outputs) * _padded(inputs)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        outputs, inputs = weight.shape
        return pad(weight, (0, _padded(inputs) - inputs, 0, _padded(outputs) - outputs))

    def sums(self, digits: torch.Tensor, packed: torch.Tensor, outputs: int) -> torch.Tensor:
        rows, inputs = digits.shape
        digits = pad(digits, (0, packed.shape[1] - inputs, 0, max(0, _FEWEST_ROWS - rows)))
        return torch._int_mm(digits, packed.t())[:rows, :outputs]


class Bfloat16Backend:
    """Digits and weights are integers of 8 bits at most, which bfloat16 has all."""

    arithmetic = "bfloat16 digits"

    def weight_bytes(self, outputs: int, inputs: int) -> int:
        return outputs * inputs * torch.bfloat16.itemsize

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(torch.bfloat16)

    def sums(self, digits: torch.Tensor, packed: torch.Tensor, outputs: int) -> torch.Tensor:
        digits = digits.to(torch.bfloat16)
        sums = torch.zeros(len(digits), outputs, dtype=torch.int32, device=digits.device)
        for start in range(0, digits.shape[1], _EXACT_DEPTH):
            run = slice(start, start + _EXACT_DEPTH)
            sums += _float32_product(digits[:, run], packed[:, run]).to(torch.int32)
        return sums


def choose_backend(device: torch.device) -> Backend:
    """By what the card has fast."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _FIRST_INT8 or capability in _SLOW_INT8:
        return Bfloat16Backend()
    return Int8Backend()


def _float32_product(digits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if digits.device.type == "cuda":
        return torch.mm(digits, weight.t(), out_dtype=torch.float32)
    # CUDA alone has that product.
    return torch.mm(digits.float(), weight.t().float())


def _padded(size: int) -> int:
    return -(-size // _SIZE_STEP) * _SIZE_STEP
