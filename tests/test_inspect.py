"""`tsqp-shm inspect`: what it says of a model, of its memory in each mode, and of what is refused."""

from __future__ import annotations

import contextlib
import json
import struct

import numpy as np
import pytest
import torch
from commands import assert_one_line, run
from models import RandomModel, edit_config, model_folder, with_tokenizer

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig
from tsqp_shm.gpu.kv_cache import KVCache
from tsqp_shm.gpu.weights import weights_size_bytes
from tsqp_shm.inspection.report import examine
from tsqp_shm.model.field_weights import load_field_linear
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.modes import MODES
from tsqp_shm.shm.plan import Plan

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}


def inspected(folder, **limits: int):
    """As the command gives it in JSON."""
    found, _ = examine(folder, lambda mode: EngineConfig(mode=mode, **limits))
    return json.loads(json.dumps(found))


def size_of(found, mode, what):
    (size,) = (part["size_bytes"] for part in found["modes"][mode]["parts"] if part["what"] == what)
    return size


def test_it_says_what_a_model_is():
    folder = model_folder(RandomModel("mistral", {"sliding_window": 48}, stored_as="float32"))
    found = inspected(folder)
    assert (found["family"], found["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert found["refused"] is None
    assert set(found["checkpoint"]["bytes_by_dtype"]) == {"F32"}
    assert found["network"]["windows"] == [48, 48]
    assert found["network"]["rope"]["theta"] == ModelSpec.from_folder(folder).rope.theta
    in_float32 = found["checkpoint"]["bytes"] // 4
    assert found["network"]["parameters"] == in_float32
    assert (found["tokenizer"], found["chat_template"], set(found["modes"])) == (None, None, set(MODES))


def test_it_says_what_a_model_is_in_lines(demo_model):
    done = run("inspect", demo_model)
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.split("\n\n")[0].splitlines() if "chat" not in line)
    assert lines["parameters"] == "134,515,008"
    assert lines["vocabulary"] == "49,152, lm_head is the embedding"
    assert lines["supported"] == "yes"
    assert "chat template tokenizer_config.json" in done.stdout
    for mode in MODES:
        assert f"\n{mode}: memory with 4,096 tokens a sequence" in done.stdout


def test_the_memory_of_plain_is_what_its_processes_reckon_with():
    folder = model_folder(RandomModel("qwen2"))
    found = inspected(folder, max_model_len=300, max_num_seqs=3, max_batch_tokens=64)
    network = Network.of(ModelSpec.from_folder(folder))
    limits = EngineConfig(max_model_len=300, max_num_seqs=3, max_batch_tokens=64).limits(512, 0)
    totals = found["modes"]["plain"]["total_bytes"]
    assert totals["arena"] == Plan.derive(network, limits).total_bytes
    expected = weights_size_bytes(network, torch.bfloat16) + KVCache.size_bytes(network, 3, 300, torch.bfloat16)
    assert totals["GPU process"] == expected


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_weights_and_caches_of_tee_only_take_what_they_take_when_they_are_there(family):
    folder = model_folder(RandomModel(family))
    found = inspected(folder, max_model_len=130, max_num_seqs=3)
    network = Network.of(ModelSpec.from_folder(folder))
    with Checkpoint.open(folder) as checkpoint:
        expected = sum(load_field_linear(checkpoint, linear).num_bytes for linear in network.linears)
    parts = ("weights, int8", "their scales, sums and biases")
    assert sum(size_of(found, "tee-only", what) for what in parts) == expected

    blocks = np.arange(9, dtype=np.int32).reshape(3, 3)
    heads = [(layer.attention.num_kv_heads, layer.attention.head_dim) for layer in network.layers]
    expected = sum(_native.KeyValueCache(count, head_dim, blocks).num_bytes for count, head_dim in heads)
    assert size_of(found, "tee-only", "key and value cache, bfloat16") == expected


def test_weights_checks_and_pads_of_blinded_take_what_they_take_when_they_are_there():
    folder = model_folder(RandomModel("qwen2"))
    found, _ = examine(
        folder, lambda mode: EngineConfig(mode=mode, **({"pad_stock": "5"} if mode == "blinded" else {}))
    )
    network = Network.of(ModelSpec.from_folder(folder))
    with Checkpoint.open(folder) as checkpoint:
        weights = [load_field_linear(checkpoint, linear) for linear in network.linears]
    keys = _native.PadKeys(b"inspected", b"", 0, len(weights))
    with contextlib.closing(_native.PadStock(keys, weights, 5, 0)) as stock:
        # A ring begins at a line of its own, behind a page.
        assert size_of(found, "blinded", "pad stock of 5 rows") == 5 * _native.PadStock.row_bytes(weights)
        assert 0 <= stock.num_bytes - 5 * stock.row_bytes(weights) <= 4096 + 64 * len(weights)

    parts = [(part["where"], part["size_bytes"]) for part in found["modes"]["blinded"]["parts"]]
    of_weights = [where for where, size in parts if size == size_of(found, "tee-only", "weights, int8")]
    assert of_weights == ["GPU process", "TEE process"]
    assert size_of(found, "blinded", "check vectors") == size_of(found, "verified", "check vectors")


def test_without_a_word_of_it_a_pad_stock_covers_the_longest_sequence():
    found = inspected(model_folder(RandomModel("llama")), max_model_len=300)
    assert size_of(found, "blinded", "pad stock of 300 rows") > 0


@pytest.mark.parametrize(
    ("limit", "what"),
    [
        ("max_model_len", "key and value cache, bfloat16"),
        ("max_num_seqs", "key and value cache, bfloat16"),
        ("max_batch_tokens", "slot x"),
    ],
)
def test_what_a_limit_doubles_takes_twice_the_memory(limit, what):
    folder = model_folder(RandomModel("llama"))
    for mode in MODES:
        once, twice = (size_of(inspected(folder, **{limit: value}), mode, what) for value in (128, 256))
        assert twice == 2 * once


def test_a_model_of_a_hundred_gigabytes_is_not_read(tmp_path):
    """Its weights are a hole in a file; who read them would read for minutes."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    header, end = {}, 0
    for name, shape in Network.of(ModelSpec.from_folder(tmp_path)).tensors():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert end > 100e9
    found = inspected(tmp_path)
    assert found["refused"] is None
    assert found["network"]["parameters"] == 70_553_706_496
    assert size_of(found, "plain", "weights, bfloat16") > 140e9


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_act", "gelu", "hidden_act"),
        ("model_type", "mamba", "model_type"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "rope_scaling.rope_type"),
        ("hidden_size", 144, "model.embed_tokens.weight"),
    ],
)
def test_a_refusal_names_the_field(tmp_path, field, value, said):
    folder = RandomModel("llama").write(tmp_path)
    edit_config(folder, lambda config: config.update({field: value}))
    found = inspected(folder)
    assert said in found["refused"]
    assert found["checkpoint"]["tensors"] > 0


def test_what_is_refused_is_told_in_its_line_and_by_the_exit_code(tmp_path):
    folder = RandomModel("llama").write(tmp_path)
    edit_config(folder, lambda config: config.update(hidden_act="gelu"))
    done = run("inspect", folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"supported     no: {inspected(folder)['refused']}" in done.stdout.splitlines()


def test_of_a_config_without_weights_the_memory_is_said_all_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    found = inspected(tmp_path)
    assert "no weights" in found["refused"]
    assert size_of(found, "plain", "weights, bfloat16") > 140e9


def test_a_tokenizer_and_a_template_that_are_refused_are_named(tmp_path, demo_model):
    folder = with_tokenizer(RandomModel("llama").write(tmp_path), demo_model)
    (folder / "chat_template.jinja").write_text("{{ nothing.of.this }}")
    found = inspected(folder)
    assert found["tokenizer"] == {"file": "tokenizer.json", "refused": None}
    assert found["chat_template"]["file"] == "chat_template.jinja"
    assert "undefined" in found["chat_template"]["refused"]
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in inspected(folder)["tokenizer"]["refused"]


def test_json_goes_to_stdout_alone_or_to_a_file_beside_the_table(tmp_path):
    folder = model_folder(RandomModel("llama"))
    assert json.loads(run("inspect", folder, "--json", "-", "--max-num-seqs", 3).stdout) == inspected(
        folder, max_num_seqs=3
    )
    done = run("inspect", folder, "--json", tmp_path / "found.json")
    assert "supported     yes" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text()) == inspected(folder)


def test_names_in_a_config_do_not_steer_the_terminal(tmp_path):
    folder = RandomModel("llama").write(tmp_path)
    edit_config(folder, lambda config: config.update(architectures=["\x1b[2J"], model_type="\x1b]0;x\x07"))
    done = run("inspect", folder)
    assert "\x1b" not in done.stdout
    assert "\\x1b[2J" in done.stdout


def test_what_is_no_model_folder_is_one_line(tmp_path):
    assert_one_line(run("inspect", tmp_path), 1, "config.json")
    assert_one_line(run("inspect", tmp_path / "nothing"), 1, "nothing")


def test_a_wrong_flag_is_one_line(tmp_path):
    folder = model_folder(RandomModel("llama"))
    assert_one_line(run("inspect", folder, "--max-model-len", 0), 2, "max_model_len")
    assert_one_line(run("inspect", folder, "--max-model-len", 10_000), 2, "512 positions")
    assert_one_line(run("inspect", folder, "--json", tmp_path / "no" / "x.json"), 2, "json")
