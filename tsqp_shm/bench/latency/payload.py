"""What crosses in a round trip, and how either side shows that it has touched every byte of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tsqp_shm.errors import ProtocolError

Words = npt.NDArray[np.uint64]

# The peer answers each word xor this; the sum of the answer shows that every word was read and written.
ANSWER_MASK = 0x5A5A5A5A5A5A5A5A


def answer(question: Words, out: Words) -> None:
    """Reads every word of a question and writes every word of its answer, in place too."""
    np.bitwise_xor(question, ANSWER_MASK, out=out)


def check_answer(words: Words, value: int) -> None:
    """Reads every word of the answer to a payload that was filled with a value.

    Raises:
        ProtocolError: it is another one.
    """
    expected = (value ^ ANSWER_MASK) * words.size % (1 << 64)
    found = int(words.sum())
    if found != expected:
        raise ProtocolError("payload", f"a sum of {expected:#x}", f"{found:#x}")
