"""The digest of a model, against a program that shares nothing with the package but the words of its definition."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import assert_one_line, run
from models import RandomModel, edit_config, model_folder, with_tokenizer
from safetensors.torch import load_file, save_file

from tsqp_shm import _native
from tsqp_shm.model.digest import Digests, model_digest
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint

FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Of every safetensors file of a folder, in float32."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        begin = 8 + struct.unpack("<Q", content[:8])[0]
        for name, entry in json.loads(content[8:begin]).items():
            if name == "__metadata__":
                continue
            first, last = (begin + offset for offset in entry["data_offsets"])
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(content[first:last], "<u2").astype("<u4") << 16).view("<f4")
            else:
                values = np.frombuffer(content[first:last], {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
            found[name] = values.astype(np.float32).reshape(entry["shape"])
    return found


def quantised(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The arithmetic's own rule: a scale for each row, and the quotients in float32, rounded to the nearest even."""
    scales = np.abs(weight).max(axis=1) / np.float32(127)
    scales[scales == 0] = 1
    return np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8), scales


def digests_by_hand(folder: Path) -> tuple[str, str]:
    """Of the model, and of its Linears."""
    config, tensors = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    if "model.embed_tokens.weight" not in tensors:
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    stream = hashlib.sha256(b"tsqp-shm model digest 2\n")
    linears = hashlib.sha256(b"tsqp-shm linears digest 1\n")

    def add(stream, name: str, array: np.ndarray) -> None:
        stream.update(f"tensor {name} {array.dtype.name} {'x'.join(map(str, array.shape))}\n".encode())
        stream.update(array.tobytes())

    def add_linear(name: str) -> None:
        whole, scales = quantised(tensors[f"{name}.weight"])
        add(linears, f"{name}.weight", whole)
        add(linears, f"{name}.weight.scales", scales)
        if f"{name}.bias" in tensors:
            add(linears, f"{name}.bias", tensors[f"{name}.bias"])

    for name in FILES:
        path = folder / name
        if path.exists():
            stream.update(f"file {name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        else:
            stream.update(f"none {name}\n".encode())

    def add_whole(name: str) -> None:
        add(stream, name, tensors[name])

    add_whole("model.embed_tokens.weight")
    for layer in range(config["num_hidden_layers"]):
        of_layer = f"model.layers.{layer}"
        add_whole(f"{of_layer}.input_layernorm.weight")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            add_linear(f"{of_layer}.self_attn.{name}")
        add_whole(f"{of_layer}.post_attention_layernorm.weight")
        for name in ("gate_proj", "up_proj", "down_proj"):
            add_linear(f"{of_layer}.mlp.{name}")
    add_whole("model.norm.weight")
    add_linear("model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head")
    stream.update(f"linears sha256:{linears.hexdigest()}\n".encode())
    return f"sha256:{stream.hexdigest()}", f"sha256:{linears.hexdigest()}"


def digests_of(folder: Path, progress=lambda done, total: None) -> Digests:
    with Checkpoint.open(folder) as checkpoint:
        return model_digest(ModelFiles(folder), Network.of(ModelSpec.from_folder(folder)), checkpoint, progress)


def digest_of(folder: Path) -> str:
    return digests_of(folder).model


@pytest.mark.parametrize(
    "model",
    [
        RandomModel("llama"),
        RandomModel("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        RandomModel("mistral", stored_as="float32"),
        RandomModel("qwen2", stored_as="float16", shards=True),
    ],
    ids=["llama", "llama, tied, with biases", "mistral, float32", "qwen2, float16, in shards"],
)
def test_the_digest_is_what_its_definition_says(model):
    folder = model_folder(model)
    assert digests_of(folder) == digests_by_hand(folder)


@pytest.mark.slow
def test_the_digest_of_the_demo_model_is_what_its_definition_says(demo_model):
    done = run("inspect", demo_model, "--digest")
    model, linears = digests_by_hand(demo_model)
    assert {f"digest        {model}", f"its Linears   {linears}"} <= set(done.stdout.splitlines())
    assert done.stderr == ""


@pytest.fixture
def folder(tmp_path, demo_model) -> Path:
    """A small model with a tokenizer, to be changed."""
    return with_tokenizer(RandomModel("llama").write(tmp_path / "model"), demo_model)


def rewritten(folder: Path, change) -> None:
    """The weights after a change of their dict, in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def without_prefix(tensors: dict) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def in_float32(tensors: dict) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.float()


def with_another_tensor(tensors: dict) -> None:
    tensors["nobody.reads.this"] = torch.ones(4)


@pytest.mark.parametrize("change", [without_prefix, in_float32, with_another_tensor])
def test_how_the_weights_are_kept_is_not_in_the_digest(folder, change):
    before = digest_of(folder)
    rewritten(folder, change)
    assert digest_of(folder) == before


def test_how_the_weights_are_cut_into_files_is_not_in_the_digest(tmp_path):
    whole, sharded = RandomModel("llama").write(tmp_path / "a"), RandomModel("llama", shards=True).write(tmp_path / "b")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert digest_of(whole) == digest_of(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_one_changed_weight_changes_the_digest(folder, name):
    before = digest_of(folder)

    def change(tensors: dict) -> None:
        in_float32(tensors)
        tensors[name].view(-1)[7] = 1.5 * tensors[name].view(-1)[7] + 0.5

    rewritten(folder, change)
    assert digest_of(folder) != before


def test_the_digest_of_the_linears_is_of_their_weights_and_of_nothing_else(folder):
    before = digests_of(folder).linears
    edit_config(folder, lambda config: config.update(a_field_that_nobody_reads=1))

    def change_the_others(tensors: dict) -> None:
        in_float32(tensors)
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            tensors[name] += 1

    rewritten(folder, change_the_others)
    assert digests_of(folder).linears == before


@pytest.mark.parametrize("name", FILES)
def test_one_changed_file_changes_the_digest(folder, name):
    before = digest_of(folder)
    path = folder / name
    if name.endswith(".json"):
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, "a_field_that_nobody_reads": 1}))
    else:
        path.write_text("{{ messages }}")
    assert digest_of(folder) != before


def test_a_file_that_is_empty_is_not_one_that_is_not_there(folder):
    before = digest_of(folder)
    (folder / "chat_template.jinja").write_text("")
    assert digest_of(folder) != before


def test_names_of_the_folder_and_of_other_files_are_not_in_the_digest(folder, tmp_path):
    before = digest_of(folder)
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("A model.")
    assert digest_of(moved) == before


def test_neither_the_instruction_set_nor_the_threads_are_in_the_digest(folder):
    active, expected = _native.active_instruction_set(), digest_of(folder)
    try:
        for isa in _native.instruction_sets():
            _native.use_instruction_set(isa)
            for threads in (1, 2, 5):
                _native.set_num_threads(threads)
                assert digest_of(folder) == expected
    finally:
        _native.use_instruction_set(active)
        _native.set_num_threads(1)


def test_progress_goes_up_to_all_of_the_weights(folder):
    told = []
    digests_of(folder, lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1] == len({total for _, total in told}) * told[0][1]


def test_a_model_that_is_refused_has_no_digest(folder):
    edit_config(folder, lambda config: config.update(hidden_act="gelu"))
    done = run("inspect", folder, "--digest", "--json", "-")
    found = json.loads(done.stdout)
    assert (found["digest"], found["linears_digest"]) == (None, None)


def test_a_weight_that_is_no_number_is_one_line(folder):
    def change(tensors: dict) -> None:
        in_float32(tensors)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan

    rewritten(folder, change)
    assert_one_line(run("inspect", folder, "--digest"), 1, "model.layers.1.mlp.down_proj.weight")
