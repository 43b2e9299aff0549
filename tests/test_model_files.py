"""Whatever lies under the name of a model's file: it is read as a regular file of a bounded size, or refused."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from tsqp_shm.errors import ModelFileError, TsqpError
from tsqp_shm.model.added_tokens import TokenizerConfig
from tsqp_shm.model.chat_template import ChatTemplate
from tsqp_shm.model.confined import ConfinedProcess
from tsqp_shm.model.files import is_there, read_file
from tsqp_shm.model.json_fields import read_json_object
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tensor_file import TensorFile
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.model.weights import INDEX_FILE, SINGLE_FILE, Checkpoint

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 8,
    "vocab_size": 8,
}  # fmt: skip


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        # Its own path is too long for a socket's.
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


TRAPS = [make_fifo, Path.mkdir, make_endless, make_link_to_nowhere, make_huge, make_socket]


def read_tokenizer_config(folder: Path) -> None:
    TokenizerConfig.from_folder(folder, tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])))


def read_template(folder: Path) -> None:
    ChatTemplate.from_folder(folder, TokenizerConfig(), ConfinedProcess())


READERS = {
    "config.json": ModelSpec.from_folder,
    "generation_config.json": ModelSpec.from_folder,
    SINGLE_FILE: ModelSpec.from_folder,
    INDEX_FILE: Checkpoint.open,
    "shard.safetensors": Checkpoint.open,
    "tokenizer.json": Tokenizer.from_folder,
    "tokenizer_config.json": read_tokenizer_config,
    "special_tokens_map.json": read_tokenizer_config,
    "added_tokens.json": read_tokenizer_config,
    "chat_template.jinja": read_template,
}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_of_a_model_is_one_error_that_names_it(tmp_path, name, trap):
    if name != "config.json":
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if name == "shard.safetensors":
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": name}}))
    trap(tmp_path / name)
    with pytest.raises(ModelFileError) as caught:
        READERS[name](tmp_path)
    assert caught.value.path == str(tmp_path / name)
    assert str(caught.value).isprintable()


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "link").symlink_to("blob")
    assert read_file(tmp_path / "link", 7) == b"content"
    with pytest.raises(ModelFileError, match="larger than 6 bytes"):
        read_file(tmp_path / "link", 6)


def test_a_link_to_nowhere_is_there():
    assert not is_there(Path("/nowhere"))


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b"{", b'{"a":' * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"])
def test_what_is_no_json_object_is_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_json_object(tmp_path / "x.json")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def tensor_file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ODD_HEADERS = [
    ({"a": entry()}, 4),
    ({"a": entry(), "b": entry(offsets=(4, 8))}, 8),
    ({"a": entry(), "b": entry()}, 4),
    ({"a": entry(), "b": entry(offsets=(2, 6))}, 6),
    ({"a": entry(offsets=(4, 8))}, 8),
    ({"a": entry()}, 5),
    ({"a": entry()}, 3),
    ({"a": entry(shape=(-1,))}, 4),
    ({"a": entry(shape=(1.0,))}, 4),
    ({"a": entry(shape=(True,))}, 4),
    ({"a": entry(shape=1)}, 4),
    ({"a": entry(shape=(2,))}, 4),
    ({"a": entry(shape=(1 << 32, 1 << 32), offsets=(0, 0))}, 0),
    ({"a": entry(offsets=(4, 0))}, 4),
    ({"a": entry(offsets=(0, 4, 8))}, 4),
    ({"a": entry("F99")}, 4),
    ({"a": entry("\x1b[2J")}, 4),
    ({"a": entry("F4", (2,), (0, 1))}, 1),
    ({"a": entry("F4", (3,), (0, 1))}, 1),
    ({"a": entry("F64", (), (0, 8))}, 8),
    ({"a": entry("BOOL", (0, 7), (0, 0))}, 0),
    ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    ({"a": 3}, 0),
    ({"__metadata__": {"a": "b"}}, 0),
    ({"__metadata__": {"a": 1}}, 0),
    ({"__metadata__": None}, 0),
    ([1], 0),
    ({}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("header", "size"), ODD_HEADERS, ids=repr)
def test_a_header_is_taken_as_safetensors_takes_it(tmp_path, header, size):
    content = tensor_file(json.dumps(header).encode(), bytes(size))
    (tmp_path / "x").write_bytes(content)
    try:
        theirs = {name: (info["dtype"], tuple(info["shape"])) for name, info in deserialize(content)}
    except SafetensorError:
        with pytest.raises(ModelFileError, match="not a whole safetensors file") as caught:
            TensorFile.open(tmp_path / "x")
        assert str(caught.value).isprintable()
    else:
        file = TensorFile.open(tmp_path / "x")
        file.close()
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()} == theirs


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=64) | st.builds(tensor_file, st.binary(max_size=80), st.binary(max_size=8)))
@example(tensor_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":3}', bytes(4)))
@example(tensor_file(b"[" * 100_000))
@example((1 << 62).to_bytes(8, "little") + b"{}")
def test_no_bytes_end_in_another_kind_of_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "x"
    path.write_bytes(content)
    try:
        TensorFile.open(path).close()
    except TsqpError as error:
        assert str(error).isprintable()
