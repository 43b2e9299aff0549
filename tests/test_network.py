"""The network as data: every tensor of a checkpoint has one place in it, and the plan's widths are its widths."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models import RandomModel, model_folder
from safetensors import safe_open

from tsqp_shm.config import EngineConfig
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Geometry, Plan

MODELS = [
    RandomModel("llama"),
    RandomModel("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}),
    RandomModel("mistral", {"sliding_window": 16}),
    RandomModel("qwen2"),
    RandomModel("qwen2", {"tie_word_embeddings": True}),
]


def network_of(folder) -> Network:
    return Network.of(ModelSpec.from_folder(folder))


def require_each_tensor_once(folder) -> None:
    tensors = list(network_of(folder).tensors())
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert len(tensors) == len(dict(tensors))
    assert dict(tensors) == found
    with Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.names()) == set(found)


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_every_tensor_of_a_checkpoint_is_named_once(model):
    require_each_tensor_once(model_folder(model))


def test_every_tensor_of_the_demo_model_is_named_once(demo_model):
    require_each_tensor_once(demo_model)


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_a_linear_s_number_is_its_place_in_the_order(model):
    network = network_of(model_folder(model))
    assert [linear.index for linear in network.linears] == list(range(len(network.linears)))
    of_layer = ["qkv", "o", "gate_up", "down"]
    assert [linear.role for linear in network.linears] == [*of_layer * network.num_layers, "lm_head"]
    names = [part.weight for linear in network.layers[1].linears for part in linear.parts]
    assert names == [
        *(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    ]


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_linears_fit_the_slots_that_the_plan_gives_them(model):
    network = network_of(model_folder(model))
    plan = Plan.derive(network, EngineConfig().limits(512, network.layer_parameters))
    assert len(plan.linears) == len(network.linears)
    for linear, planned in zip(network.linears, plan.linears, strict=True):
        assert planned.operation.name == linear.role.upper()
        if planned.slots is not None:
            widths = tuple(plan.slot(name).row_elements for name in planned.slots)
            assert widths == (linear.inputs, linear.outputs)


def test_a_tied_lm_head_is_the_embedding_once_more():
    tied, own = (network_of(model_folder(RandomModel("qwen2", {"tie_word_embeddings": tie}))) for tie in (True, False))
    assert (tied.is_tied, own.is_tied) == (True, False)
    assert tied.lm_head.parts[0].weight == "model.embed_tokens.weight"
    assert own.lm_head.parts[0].weight == "lm_head.weight"
    assert (tied.lm_head.inputs, tied.lm_head.outputs) == (own.lm_head.inputs, own.lm_head.outputs)
    assert own.parameters - tied.parameters == own.vocab_size * own.hidden_size


def test_layers_that_have_the_same_linears_are_told_as_one_run():
    network = network_of(model_folder(RandomModel("llama", {"num_hidden_layers": 3})))
    roles = ("qkv", "o", "gate_up", "down")
    assert Geometry.of(network).linear_roles == ((3, roles), (1, ("lm_head",)))
    odd = replace(network.layers[1].attention.o, role="other")
    middle = replace(network.layers[1], attention=replace(network.layers[1].attention, o=odd))
    mixed = replace(network, layers=(network.layers[0], middle, network.layers[2]))
    assert mixed.linear_roles == ((1, roles), (1, ("qkv", "other", "gate_up", "down")), (1, roles), (1, ("lm_head",)))
