"""A checkpoint is read into private memory, and a bad file is refused with the reason."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import save_file

from tsqp_shm.errors import ModelFileError
from tsqp_shm.model.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    bfloat16_to_float32,
    float32_to_bfloat16,
    write_safetensors,
)
from tsqp_shm.roles.resources import num_open_descriptors


def save_torch(path, **tensors):
    from safetensors.torch import save_file as save_torch_file

    save_torch_file(tensors, path)


def raw_file(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def folder(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    save_file(arrays, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    import torch

    values = torch.randn(5, 7)
    save_torch(tmp_path / SINGLE_FILE, bf16=values.bfloat16(), f16=values.half(), f32=values)
    with Checkpoint.open(tmp_path) as checkpoint:
        tensors = {name: checkpoint.tensor(name, (5, 7)) for name in checkpoint.names()}
    assert {name: (tensor.dtype, tensor.data.dtype) for name, tensor in tensors.items()} == {
        "bf16": ("BF16", np.uint16),
        "f16": ("F16", np.float16),
        "f32": ("F32", np.float32),
    }
    np.testing.assert_array_equal(tensors["bf16"].to_float32(), values.bfloat16().float().numpy())
    np.testing.assert_array_equal(tensors["f16"].to_float32(), values.half().float().numpy())
    np.testing.assert_array_equal(tensors["f32"].to_float32(), values.numpy())


def test_a_tensor_is_memory_of_its_own(folder):
    with Checkpoint.open(folder) as checkpoint:
        first, second = (checkpoint.tensor("a", (2, 3)) for _ in range(2))
    assert first.data.ctypes.data % 64 == 0
    assert not np.shares_memory(first.data, second.data)
    first.to_float32()[0, 0] = 9
    assert second.data[0, 0] == 0
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_truncated_after_it_was_opened_is_named(folder):
    with Checkpoint.open(folder) as checkpoint:
        os.truncate(folder / SINGLE_FILE, 100)
        with pytest.raises(ModelFileError, match=r"model\.safetensors: truncated while it is read, in tensor 'a'"):
            checkpoint.tensor("a", (2, 3))


def test_a_closed_checkpoint_holds_no_file(folder):
    before = num_open_descriptors()
    with Checkpoint.open(folder):
        assert num_open_descriptors() == before + 1
    assert num_open_descriptors() == before


def test_a_checkpoint_that_cannot_be_opened_holds_no_file(sharded):
    before = num_open_descriptors()
    os.truncate(sharded / "model-2.safetensors", 50)
    with pytest.raises(ModelFileError, match="model-2"):
        Checkpoint.open(sharded)
    assert num_open_descriptors() == before


def test_a_closed_checkpoint_says_so(folder):
    checkpoint = Checkpoint.open(folder)
    checkpoint.close()
    with pytest.raises(ModelFileError, match="closed"):
        checkpoint.tensor("a", (2, 3))


def test_shards_are_found_through_the_index(sharded):
    with Checkpoint.open(sharded) as checkpoint:
        assert checkpoint.names() == ("a", "b")
        assert checkpoint.tensor("b", (3,)).data.tolist() == [1, 1, 1]


def test_shards_may_be_symbolic_links(sharded):
    stored = sharded / "blobs"
    stored.mkdir()
    (sharded / "model-1.safetensors").rename(stored / "0123")
    (sharded / "model-1.safetensors").symlink_to(stored / "0123")
    with Checkpoint.open(sharded) as checkpoint:
        assert checkpoint.tensor("a", (2,)).data.tolist() == [0, 0]


def test_a_missing_tensor_is_named(folder):
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(ModelFileError, match=r"no tensor named 'lm_head"),
    ):
        checkpoint.tensor("lm_head.weight", (2, 3))


def test_a_wrong_shape_is_named_with_its_file(folder):
    with Checkpoint.open(folder) as checkpoint, pytest.raises(ModelFileError) as caught:
        checkpoint.tensor("a", (3, 2))
    assert caught.value.path == str(folder / SINGLE_FILE)
    assert "'a' has shape [2, 3], the config implies [3, 2]" in caught.value.reason


def test_an_unsupported_dtype_is_named(tmp_path):
    save_file({"a": np.zeros(2, np.int32)}, tmp_path / SINGLE_FILE)
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(ModelFileError, match="'a' is I32; supported: BF16"),
    ):
        checkpoint.tensor("a", (2,))


def test_a_tensor_at_an_odd_offset_is_aligned(tmp_path):
    values = np.arange(3, dtype=np.float32)
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    (tmp_path / SINGLE_FILE).write_bytes(raw_file(header, b"x" + values.tobytes()))
    with Checkpoint.open(tmp_path) as checkpoint:
        data = checkpoint.tensor("a", (3,)).data
    assert data.flags.aligned
    assert data.tolist() == [0, 1, 2]


def test_scalars_and_empty_tensors_are_tensors(tmp_path):
    import torch

    save_torch(tmp_path / SINGLE_FILE, scalar=torch.tensor(1.5).bfloat16(), empty=torch.zeros(0, 3))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensor("scalar", ()).to_float32().shape == ()
        assert checkpoint.tensor("scalar", ()).to_float32() == 1.5
        assert checkpoint.tensor("empty", (0, 3)).data.shape == (0, 3)


GOOD = raw_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[:5], id="no header length"),
        pytest.param(GOOD[:20], id="truncated header"),
        pytest.param(GOOD[:-1], id="truncated data"),
        pytest.param(GOOD + b"x", id="trailing bytes"),
        pytest.param(b"\xff" * 64, id="huge header"),
        pytest.param(b"not a checkpoint, though long enough", id="text"),
        pytest.param(raw_file([1], b""), id="header is a list"),
        pytest.param(raw_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)), id="size"),
        pytest.param(raw_file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)), id="negative"),
        pytest.param(raw_file({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), id="dtype"),
        pytest.param(raw_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)), id="hole"),
    ],
)
def test_a_broken_file_is_refused_when_it_is_opened(tmp_path, content):
    path = tmp_path / SINGLE_FILE
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="not a whole safetensors file") as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.path == str(path)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(GOOD) - 9), st.binary(min_size=1, max_size=6))
def test_damage_to_a_header_never_ends_in_another_kind_of_error(tmp_path_factory, position, damage):
    folder = tmp_path_factory.mktemp("damaged")
    content = GOOD[:position] + damage + GOOD[position + len(damage) :]
    (folder / SINGLE_FILE).write_bytes(content)
    try:
        with Checkpoint.open(folder) as checkpoint:
            for name in checkpoint.names():
                checkpoint.tensor(name, (2,))
    except ModelFileError:
        pass


def test_a_folder_without_weights_says_what_it_expects(tmp_path):
    with pytest.raises(ModelFileError, match=r"no weights: expected model\.safetensors or"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../x.safetensors", "/etc/passwd", "a/b", "a\0b", 3, None, ["x"]])
def test_an_index_cannot_point_out_of_its_folder(sharded, name):
    write_index(sharded, {"a": name})
    with pytest.raises(ModelFileError, match="not a file of this folder"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "model-9.safetensors"}, r"model-9\.safetensors: no such file"),
        ({"c": "model-1.safetensors"}, r"model-1\.safetensors: tensor 'c'"),
        ({}, "weight_map"),
        ([], "weight_map"),
        (None, "weight_map"),
    ],
)
def test_a_broken_index_is_refused(sharded, weight_map, reason):
    write_index(sharded, weight_map)
    with pytest.raises(ModelFileError, match=reason):
        Checkpoint.open(sharded)


@settings(deadline=None)
@given(npst.arrays(np.uint32, st.integers(0, 97)))
def test_rounding_to_bfloat16_is_that_of_torch(bits):
    import torch

    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(bfloat16_to_float32(float32_to_bfloat16(values)), expected)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        pytest.param(0x3F808000, 0x3F80, id="tie to even, down"),
        pytest.param(0x3F818000, 0x3F82, id="tie to even, up"),
        pytest.param(0x3F808001, 0x3F81, id="above a tie"),
        pytest.param(0x7F7FFFFF, 0x7F80, id="overflow to infinity"),
        pytest.param(0xFF800000, 0xFF80, id="minus infinity"),
        pytest.param(0x80000000, 0x8000, id="minus zero"),
        pytest.param(0x00018000, 0x0002, id="denormal"),
        pytest.param(0x7F800001, 0x7FC0, id="NaN with a small payload"),
        pytest.param(0xFFFFFFFF, 0xFFFF, id="negative NaN with a full payload"),
    ],
)
def test_special_values_round_to_bfloat16(bits, expected):
    assert float32_to_bfloat16(np.array([bits], np.uint32).view(np.float32))[0] == expected


def test_a_bfloat16_survives_the_way_to_float32_and_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = ~np.isnan(bfloat16_to_float32(bits))
    np.testing.assert_array_equal(float32_to_bfloat16(bfloat16_to_float32(bits))[numbers], bits[numbers])


def test_what_is_written_is_read_by_safetensors_and_by_us(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "matrix": float32_to_bfloat16(np.random.default_rng(0).normal(size=(3, 5)).T),
        "scalar": np.array(0x3F80, np.uint16),
        "empty": np.zeros((0, 2), np.uint16),
    }
    write_safetensors(tmp_path / SINGLE_FILE, tensors)
    theirs = load_file(tmp_path / SINGLE_FILE)
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, bits in tensors.items():
            np.testing.assert_array_equal(checkpoint.tensor(name, bits.shape).data, bits)
            np.testing.assert_array_equal(theirs[name].float().numpy(), bfloat16_to_float32(bits))
