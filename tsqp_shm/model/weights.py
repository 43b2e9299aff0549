"""The weights of a model folder by the names of the network, and the bfloat16 that numpy does not have."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tsqp_shm.errors import ModelFileError
from tsqp_shm.model.files import MAX_INDEX_BYTES, is_there
from tsqp_shm.model.json_fields import brief, read_json_object
from tsqp_shm.model.tensor_file import MAX_HEADER_BYTES, StoredTensor, TensorFile
from tsqp_shm.printable import quoted

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Of what transformers' classes for these models call their inner model.
_PREFIX = "model."
# Each is a descriptor; no model is known that has as many.
_MAX_SHARDS = 512

Dtype = Literal["BF16", "F16", "F32", "F64"]
_STORAGE: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True, eq=False)
class Tensor:
    """One weight.

    Attributes:
        data: its elements, of this process alone: uint16 (the bits) for BF16, else floating point.
    """

    name: str
    dtype: Dtype
    data: NDArray[Any]

    def to_float32(self) -> NDArray[np.float32]:
        """Returns the values, exactly but for F64, which rounds to nearest even; no view of another array."""
        if self.dtype == "BF16":
            return bfloat16_to_float32(self.data)
        # What is too large for float32 is an infinity, which whoever cannot use one refuses.
        with np.errstate(over="ignore"):
            return self.data.astype(np.float32, copy=False)


class Checkpoint:
    """The weights of a model folder; a context manager.

    A tensor is found under its name in the network, and also without the `model.` before it, as a base model saves it,
    or with one more.

    Attributes:
        folder: the model's.

    Source: transformers' `rename_source_key`.
    """

    def __init__(self, folder: Path, files: Sequence[TensorFile]) -> None:
        self.folder = folder
        self._files = tuple(files)
        self._file_of: dict[str, TensorFile] | None = {}
        for file in files:
            for name in file.tensors:
                first = self._file_of.setdefault(name, file)
                if first is not file:
                    raise ModelFileError(file.path, f"tensor {quoted(name)!r} is in {first.path.name} too")

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads the header of `model.safetensors`, or those of the shards that `model.safetensors.index.json` names.

        Raises:
            ModelFileError: a file is missing, truncated or malformed; the message names it.
        """
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if not is_there(single) and not is_there(index):
            raise ModelFileError(folder, f"no weights: expected {SINGLE_FILE} or {INDEX_FILE}{_what_else(folder)}")
        with ExitStack() as stack:
            left_bytes = MAX_HEADER_BYTES

            def open_file(path: Path) -> TensorFile:
                nonlocal left_bytes
                file = TensorFile.open(path, left_bytes)
                stack.callback(file.close)
                left_bytes -= file.header_bytes
                return file

            if is_there(single):
                checkpoint = cls(folder, [open_file(single)])
            else:
                shard_of = _shards(index)
                files = {shard: open_file(folder / shard) for shard in sorted(set(shard_of.values()))}
                for name, shard in shard_of.items():
                    if name not in files[shard].tensors:
                        reason = f"tensor {quoted(name)!r}, which the index puts here, is missing"
                        raise ModelFileError(folder / shard, reason)
                checkpoint = cls(folder, list(files.values()))
            stack.pop_all()
        return checkpoint

    def names(self) -> tuple[str, ...]:
        """As they stand in the files."""
        return tuple(self._open())

    def stored(self, name: str) -> StoredTensor | None:
        """What a header says of a tensor; None: there is none of that name."""
        stored_name = self._stored_name(name)
        return None if stored_name is None else self._open()[stored_name].tensors[stored_name]

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Reads a weight that has the shape that the model's config implies.

        Raises:
            ModelFileError: no such tensor, two of them, another shape, a dtype other than BF16, F16, F32 and F64, or a
                file that was truncated since it was opened.
        """
        file, stored_name = self._find(name, shape)
        dtype = file.tensors[stored_name].dtype
        return Tensor(name, dtype, file.read(stored_name, _STORAGE[dtype]))  # type: ignore[arg-type]  # of _STORAGE

    def require(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Looks for tensors before anything of their sizes is allocated, and reads none.

        Raises:
            ModelFileError: as `tensor`.
        """
        for name, shape in tensors:
            self._find(name, shape)

    def close(self) -> None:
        """Lets go of the files."""
        if self._file_of is not None:
            self._file_of = None
            for file in self._files:
                file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, name: str, shape: tuple[int, ...]) -> tuple[TensorFile, str]:
        stored_name = self._stored_name(name)
        if stored_name is None:
            raise ModelFileError(self.folder, f"no tensor named {name!r} in the checkpoint")
        file = self._open()[stored_name]
        tensor = file.tensors[stored_name]
        if tensor.shape != shape:
            reason = f"tensor {stored_name!r} has shape {list(tensor.shape)}, the config implies {list(shape)}"
            raise ModelFileError(file.path, reason)
        if tensor.dtype not in _STORAGE:
            reason = f"tensor {stored_name!r} is {tensor.dtype}; supported: {', '.join(_STORAGE)}"
            raise ModelFileError(file.path, reason)
        return file, stored_name

    def _stored_name(self, name: str) -> str | None:
        files = self._open()
        found = [stored for stored in {name, _PREFIX + name, name.removeprefix(_PREFIX)} if stored in files]
        if len(found) > 1:
            reason = f"tensors {' and '.join(map(repr, sorted(found)))} are both there, and mean the same weight"
            raise ModelFileError(self.folder, reason)
        return found[0] if found else None

    def _open(self) -> dict[str, TensorFile]:
        if self._file_of is None:
            raise ModelFileError(self.folder, "the checkpoint is closed")
        return self._file_of


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


def _shards(index: Path) -> dict[str, str]:
    """Returns the shard of each tensor that the index names."""
    shard_of = read_json_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ModelFileError(index, "weight_map is missing, empty or not an object")
    for shard in shard_of.values():
        if not _is_plain_name(shard):
            raise ModelFileError(index, f"weight_map names {brief(shard)!r}, not a file of this folder")
    if len(set(shard_of.values())) > _MAX_SHARDS:
        raise ModelFileError(index, f"weight_map names more than {_MAX_SHARDS} files")
    return shard_of


def _is_plain_name(name: object) -> bool:
    # Symbolic links are followed: the Hugging Face cache is made of them. Only the index may not walk away.
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and name.isprintable()


def _what_else(folder: Path) -> str:
    """What is said about the weights that are there in place of those that are expected."""
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if is_there(folder / name):
            # NOTE: a pickle runs code of its author's when it is loaded; it is nothing for a trusted process.
            convert = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            return f"; {name} is a pickle, which transformers converts: {convert}"
    return ""
