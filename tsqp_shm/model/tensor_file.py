"""One safetensors file: its header checked as the format demands, its tensors read into private memory.

The file is not mapped: a file that is truncated under a mapping ends the process that touches it. Nor is safetensors'
own reader used, which maps it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp_shm.errors import ModelFileError
from tsqp_shm.model.files import open_file
from tsqp_shm.printable import quoted

# Of all files of a model. JSON takes some twenty times its size as Python's objects; the largest real ones have 11 MB.
MAX_HEADER_BYTES = 24 << 20
# A cache line, as torch aligns: a product reads the weights where they are.
_ALIGNMENT_BYTES = 64
# Of Linux, for one call.
_MAX_READ_BYTES = 1 << 30

ELEMENT_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file; its place and size are consistent with dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    begin_bytes: int
    size_bytes: int


class TensorFile:
    """An open safetensors file.

    Attributes:
        tensors: by name.
        header_bytes: how many the header has.
    """

    def __init__(self, path: Path, descriptor: int, tensors: dict[str, StoredTensor], header_bytes: int) -> None:
        self.path = path
        self.tensors = tensors
        self.header_bytes = header_bytes
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, most_header_bytes: int = MAX_HEADER_BYTES) -> TensorFile:
        """Reads the header alone.

        Raises:
            ModelFileError: there is no such file, it is no regular one, or it is not a whole safetensors file.
        """
        descriptor = open_file(path)
        try:
            return cls(path, descriptor, *_read_header(descriptor, most_header_bytes))
        except (ValueError, RecursionError) as error:
            os.close(descriptor)
            raise ModelFileError(path, f"not a whole safetensors file: {quoted(error)}") from error
        except OSError as error:
            os.close(descriptor)
            raise ModelFileError(path, error.strerror or quoted(error)) from error

    def read(self, name: str, storage: np.dtype[Any]) -> NDArray[Any]:
        """Returns a tensor's elements in memory of this process's own, which nobody who holds the file can change.

        Raises:
            ModelFileError: the file has been truncated since it was opened.
        """
        tensor = self.tensors[name]
        memory = np.empty(tensor.size_bytes + _ALIGNMENT_BYTES, np.uint8)
        begin = -memory.ctypes.data % _ALIGNMENT_BYTES
        content = memory[begin : begin + tensor.size_bytes]
        left, at = content.data, tensor.begin_bytes
        while left:
            try:
                count = os.preadv(self._descriptor, [left[:_MAX_READ_BYTES]], at)
            except OSError as error:
                raise ModelFileError(self.path, error.strerror or quoted(error)) from error
            if count == 0:
                raise ModelFileError(self.path, f"truncated while it is read, in tensor {quoted(name)!r}")
            left, at = left[count:], at + count
        return content.view(storage).reshape(tensor.shape)

    def close(self) -> None:
        os.close(self._descriptor)


def _read_header(descriptor: int, most_bytes: int) -> tuple[dict[str, StoredTensor], int]:
    """Source: the safetensors format, as its `SafeTensors::read_metadata` and `Metadata::validate` check it."""
    size_bytes = os.fstat(descriptor).st_size
    header_bytes = int.from_bytes(_exactly(descriptor, 8, 0), "little")
    if header_bytes > size_bytes - 8:
        raise ValueError(f"its header is said to have {header_bytes:,} bytes, and the file ends before that")
    if header_bytes > most_bytes:
        raise ValueError(f"its header has {header_bytes:,} bytes; those of a model have {MAX_HEADER_BYTES:,} at most")
    header = json.loads(_exactly(descriptor, header_bytes, 8), object_pairs_hook=_without_repetition)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")

    data_begin = 8 + header_bytes
    tensors = {name: _stored(name, entry, data_begin) for name, entry in header.items()}
    end = data_begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin_bytes, item[1].size_bytes)):
        if tensor.begin_bytes != end:
            raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
        end += tensor.size_bytes
    if end != size_bytes:
        raise ValueError(f"its tensors end at byte {end:,}, the file at {size_bytes:,}")
    return tensors, header_bytes


def _stored(name: str, entry: object, data_begin: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} has not just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
        raise ValueError(f"tensor {name!r} is of no dtype of the format")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"shape and data_offsets of tensor {name!r} are not lists of counts")
    begin, end = offsets
    bits = math.prod(shape) * ELEMENT_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(f"tensor {name!r} has not the bytes that its shape implies")
    return StoredTensor(dtype, tuple(shape), data_begin + begin, end - begin)


def _are_counts(values: object) -> bool:
    # numpy allows no more dimensions, and no memory has more elements.
    return (
        isinstance(values, list)
        and len(values) <= 32
        and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
    )


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is there twice")
    return fields


def _exactly(descriptor: int, count: int, at: int) -> bytes:
    found = b""
    while len(found) < count:
        more = os.pread(descriptor, count - len(found), at + len(found))
        if not more:
            raise ValueError("the file ends within its header")
        found += more
    return found
