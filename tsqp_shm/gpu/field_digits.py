"""Elements of the field p = 2^31 - 1 as balanced digits, whose products with int8 weights any device that multiplies
small integers exactly can take: c = sum_d 256^d digit_d, each digit in [-128, 127].

On the CPU device `native/field` does the same with unsigned digits; both give the same y = m W mod p, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsqp_shm.model.field_weights import FIELD

# What two digits hold, and three, whatever the signs: 127 in each.
TWO_DIGITS, THREE_DIGITS = 32_639, 8_355_711
_BASE_DIGITS, _MOST_DIGITS = 2, 4
# 128 in each digit, so that none is negative.
_OFFSET = 0x80808080


def digits_of_rows(words: torch.Tensor) -> list[int]:
    """How many digits each row needs, by its largest centred element; four where a word is none of the field.

    UNTRUSTED: whatever the words are, or become before they are read again: each product is of what is read then.

    Shapes: words [R, K] uint32 in this process's own memory: no device is waited for.
    """
    elements = words.view(torch.int32)
    # Of a word beyond the field that is negative, and so the smaller one.
    magnitudes = torch.minimum(elements, FIELD - elements)
    smallest, largest = magnitudes.aminmax(dim=1)
    further = (largest > TWO_DIGITS).int() + (largest > THREE_DIGITS)
    further[smallest < 0] = _MOST_DIGITS - _BASE_DIGITS
    counts: list[int] = (further + _BASE_DIGITS).tolist()
    return counts


def centred(words: torch.Tensor) -> torch.Tensor:
    """Shapes: words uint32, any -> int64 of the same shape, modulo p within +-(p - 1) / 2."""
    # Few operations know uint32; int32 has its bits.
    elements = (words.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) % FIELD
    return torch.where(elements > FIELD // 2, elements - FIELD, elements)


def digit(integers: torch.Tensor, index: int) -> torch.Tensor:
    """Shapes: integers int64 within 2^30 -> int8 of the same shape."""
    return ((((integers + _OFFSET) >> (8 * index)) & 255) - 128).to(torch.int8)


class DigitRows:
    """Rows as one matrix of digits: the first of all rows, then the second, then the third and fourth of the rows that
    have them.

    Attributes:
        digits: [D, K] int8.

    Args:
        words: [R, K] uint32, on the device.
        counts: of each row's digits.
    """

    def __init__(self, words: torch.Tensor, counts: Sequence[int]) -> None:
        self._num_rows = len(counts)
        integers = centred(words)
        pieces = [digit(integers, index) for index in range(_BASE_DIGITS)]
        # Which rows have a digit more, by its index.
        self._further: dict[int, torch.Tensor] = {}
        for index in range(_BASE_DIGITS, max(counts)):
            rows = torch.tensor([row for row, count in enumerate(counts) if count > index], device=words.device)
            self._further[index] = rows
            pieces.append(digit(integers[rows], index))
        self.digits = torch.cat(pieces)

    def combine(self, sums: torch.Tensor) -> torch.Tensor:
        """y = m W mod p out of the sums of each digit row.

        Shapes: sums [D, N] of any integers; result [R, N] int64, in [0, p).
        Numerics: exact, as no sum of digits reaches 2^31 and 256^3 of them fit 64 bits.
        """
        rows = self._num_rows
        y = sums[:rows].to(torch.int64)
        y += sums[rows : 2 * rows].to(torch.int64) << 8
        start = 2 * rows
        for index, those in self._further.items():
            of_digit = sums[start : start + len(those)]
            y.index_add_(0, those, of_digit.to(torch.int64) << (8 * index))
            start += len(those)
        return y.remainder(FIELD)
