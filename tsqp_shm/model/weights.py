"""A checkpoint on disk as read-only, zero-copy arrays, and the bfloat16 that numpy does not have.

safetensors validates a file (header, offsets, length), then numpy maps it: safetensors' own numpy front can't
give a BF16 tensor, and a copy of each weight would double the memory of a process that only passes it on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tsqp_shm.errors import ModelFileError
from tsqp_shm.model.json_fields import brief, read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Dtype = Literal["BF16", "F16", "F32"]
_STORAGE: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}


@dataclass(frozen=True, eq=False)
class Tensor:
    """One weight.

    Attributes:
        data: a read-only view of the mapped file: uint16 (the bits) for BF16, float16, float32. The view
            keeps the mapping alive, also after the checkpoint is closed.
    """

    name: str
    dtype: Dtype
    data: NDArray[Any]

    def to_float32(self) -> NDArray[np.float32]:
        """Returns the values, exactly; a copy unless they are float32 already."""
        if self.dtype == "BF16":
            return bfloat16_to_float32(self.data)
        return self.data.astype(np.float32, copy=False)


class Checkpoint:
    """The weights of a model folder; a context manager, though a view outlives it (see `Tensor`)."""

    def __init__(self, folder: Path, tensors: dict[str, _Entry]) -> None:
        self._folder = folder
        self._tensors: dict[str, _Entry] | None = tensors

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Validates and maps `model.safetensors`, or the shards that `model.safetensors.index.json` names.

        Raises:
            ModelFileError: a file is missing, truncated or malformed; the message names it.
        """
        if (folder / SINGLE_FILE).exists():
            return cls(folder, _map_file(folder / SINGLE_FILE))
        if not (folder / INDEX_FILE).exists():
            raise ModelFileError(folder, f"no weights: expected {SINGLE_FILE} or {INDEX_FILE}")
        return cls(folder, _map_shards(folder / INDEX_FILE))

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries())

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns a weight after checking that it has the shape that the model's config implies.

        Raises:
            ModelFileError: no such tensor, another shape, or a dtype other than BF16, F16 and F32.
        """
        entry = self._entries().get(name)
        if entry is None:
            raise ModelFileError(self._folder, f"no tensor named {name!r} in the checkpoint")
        if entry.shape != shape:
            reason = f"tensor {name!r} has shape {list(entry.shape)}, the config implies {list(shape)}"
            raise ModelFileError(entry.path, reason)
        if entry.dtype not in _STORAGE:
            reason = f"tensor {name!r} is {entry.dtype}; supported: {', '.join(_STORAGE)}"
            raise ModelFileError(entry.path, reason)
        return Tensor(name, entry.dtype, entry.view())  # type: ignore[arg-type]  # the keys of _STORAGE

    def close(self) -> None:
        """Lets go of the files; each is unmapped when the last view of it is gone."""
        self._tensors = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _entries(self) -> dict[str, _Entry]:
        if self._tensors is None:
            raise ModelFileError(self._folder, "the checkpoint is closed")
        return self._tensors


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Returns the bits of the nearest bfloat16 values.

    Numerics: round to nearest even; overflow gives infinity; a NaN stays a NaN, quiet, with its sign.
    """
    bits = np.asarray(array, dtype=np.float32, order="C").view(np.uint32)
    rounded = bits >> np.uint32(16) & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    # The addition carries a NaN with a full mantissa into the sign bit, and rounding could leave an infinity.
    return np.where(np.isnan(array), bits >> np.uint32(16) | np.uint32(0x40), rounded).astype(np.uint16)


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.uint16]]) -> None:
    """Writes bfloat16 bits as a safetensors file, on the disk when it returns.

    Written by hand because the arguments of safetensors' own writer differ between its versions.
    Source: the safetensors format: header length (u64), JSON header padded to 8 bytes, data without gaps.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, bits in tensors.items():
        begin, end = end, end + bits.size * 2
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            file.write(np.asarray(bits, dtype="<u2", order="C").data)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, eq=False)
class _Entry:
    """Where a tensor lies in a mapped file."""

    path: Path
    mapping: NDArray[np.uint8]
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    def view(self) -> NDArray[Any]:
        storage = _STORAGE[self.dtype]
        end = self.offset_bytes + math.prod(self.shape) * storage.itemsize
        # np.asarray drops the memmap subclass; the plain view still holds the mapping through `.base`.
        view = np.asarray(self.mapping[self.offset_bytes : end]).view(storage).reshape(self.shape)
        # The format does not align tensors; kernels and torch need them aligned, so a stray one is copied.
        aligned = np.require(view, requirements="A")
        aligned.flags.writeable = False
        return aligned


def _map_file(path: Path) -> dict[str, _Entry]:
    if not path.is_file():
        raise ModelFileError(path, "no such file")
    try:
        with safe_open(str(path), framework="numpy"):
            mapping = np.memmap(path, dtype=np.uint8, mode="r")
        header_bytes = int.from_bytes(mapping[:8].tobytes(), "little")
        header = json.loads(mapping[8 : 8 + header_bytes].tobytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(path, f"not a whole safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: _Entry(path, mapping, info["dtype"], tuple(info["shape"]), 8 + header_bytes + info["data_offsets"][0])
        for name, info in header.items()
    }


def _map_shards(index: Path) -> dict[str, _Entry]:
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ModelFileError(index, "weight_map is missing, empty or not an object")
    shards: dict[str, dict[str, _Entry]] = {}
    for shard in shard_of.values():
        if not _is_plain_name(shard):
            raise ModelFileError(index, f"weight_map names {brief(shard)!r}, not a file of this folder")
        if shard not in shards:
            shards[shard] = _map_file(index.parent / shard)
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise ModelFileError(index.parent / shard, f"tensor {name!r}, which the index puts here, is missing")
    return {name: shards[shard][name] for name, shard in shard_of.items()}


def _is_plain_name(name: object) -> bool:
    # Symbolic links are followed: the Hugging Face cache is made of them. Only the index may not walk away.
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"}
