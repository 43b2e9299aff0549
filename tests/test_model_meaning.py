"""A model folder means what transformers makes of it: the same logits, or a refusal that names what is not followed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_session import LocalGpus
from models import RandomModel, edit_config, model_folder, random_token_ids, relative_distance, transformers_logits
from safetensors.torch import load_file, save_file

from tsqp_shm.errors import ModelFileError, UnsupportedModel
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.plan import Geometry

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path], None]

# As small as a model can be and still have groups of heads.
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Oddity:
    """A folder as save_pretrained writes it, changed in one way.

    Attributes:
        fields: of the config, over `SMALL`.
        edit: the change.
        tokens: how many the logits are compared on.
    """

    name: str
    edit: Edit = lambda folder: None
    family: str = "llama"
    fields: dict[str, Any] = field(default_factory=dict)
    stored_as: str = "float32"
    shards: bool = False
    tokens: int = 12

    def write(self, folder: Path) -> Path:
        model = RandomModel(self.family, {**SMALL, **self.fields}, stored_as=self.stored_as, shards=self.shards)
        shutil.copytree(model_folder(model), folder)
        self.edit(folder)
        return folder


def config(**fields: Any) -> Edit:
    """Sets fields of config.json; `...` removes one."""

    def edit(folder: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            for name, value in fields.items():
                content.pop(name, None)
                if value is not ...:
                    content[name] = value

        edit_config(folder, change)

    return edit


def tensors(change: Callable[[Tensors], Tensors | None]) -> Edit:
    def edit(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        changed = change(weights)
        save_file(weights if changed is None else changed, folder / WEIGHTS, {"format": "pt"})

    return edit


def both(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def drop(*names: str) -> Edit:
    return tensors(lambda weights: {name: weight for name, weight in weights.items() if name not in names})


def renamed(rename: Callable[[str], str]) -> Edit:
    return tensors(lambda weights: {rename(name): weight for name, weight in weights.items()})


def with_tensors(**shapes: tuple[int, ...]) -> Edit:
    return tensors(lambda weights: {**weights, **{name: torch.ones(shape) for name, shape in shapes.items()}})


def mixed_dtypes(weights: Tensors) -> Tensors:
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return {name: weight.to(dtypes[at % 4]) for at, (name, weight) in enumerate(sorted(weights.items()))}


def index(change: Callable[[dict[str, str]], None]) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def into_shards(folder: Path) -> None:
    """Two files that both hold the embedding."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(weights, folder / "model-1.safetensors")
    save_file({EMBEDDING: weights[EMBEDDING] + 1}, folder / "model-2.safetensors")
    shard_of = {**dict.fromkeys(weights, "model-1.safetensors"), EMBEDDING: "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def old_rope(theta: float = 10_000.0, **scaling: Any) -> Edit:
    """`rope_theta` and `rope_scaling`, as configs had it before transformers 5."""
    return config(rope_parameters=..., rope_theta=theta, rope_scaling=scaling or None)


def new_rope(**parameters: Any) -> Edit:
    return config(rope_parameters={"rope_theta": 10_000.0, **parameters})


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LAYERS = {"num_hidden_layers": 3}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}

FOLLOWED = [
    Oddity("as it was saved"),
    Oddity("tied", fields=TIED),
    Oddity("tied, and both matrices differ", config(**TIED)),
    Oddity("tied, and both matrices are equal", both(config(**TIED), tensors(lambda w: {**w, HEAD: w[EMBEDDING] + 0}))),
    Oddity("tied, and only lm_head is there", renamed(lambda name: HEAD if name == EMBEDDING else name), fields=TIED),
    Oddity("tied is not said", config(tie_word_embeddings=...)),
    Oddity("names of the base model", renamed(lambda name: name.removeprefix("model."))),
    Oddity("names of the base model, tied", renamed(lambda name: name.removeprefix("model.")), fields=TIED),
    Oddity("names with one more model.", renamed(lambda name: f"model.{name}")),
    Oddity(
        "tensors that no class knows",
        with_tensors(**{"model.layers.0.self_attn.rotary_emb.inv_freq": (4,), "score.weight": (2, 32), "x": ()}),
    ),
    Oddity("a bias that the config does not name", with_tensors(**{"model.layers.0.self_attn.q_proj.bias": (32,)})),
    Oddity("shards", shards=True, fields=LAYERS),
    Oddity("an index that does not name all", index(lambda shard_of: shard_of.pop(HEAD)), shards=True, fields=LAYERS),
    Oddity("dtypes that differ by tensor", tensors(mixed_dtypes)),
    Oddity("float16", stored_as="float16"),
    Oddity("bfloat16 by its old name", config(dtype=..., torch_dtype="bfloat16"), stored_as="bfloat16"),
    Oddity("hidden_act is swish", config(hidden_act="swish")),
    Oddity("hidden_act is not said", config(hidden_act=...)),
    Oddity("rms_norm_eps is not said", config(rms_norm_eps=...)),
    Oddity("head_dim is not said", config(head_dim=...)),
    Oddity("head_dim is null", config(head_dim=None)),
    Oddity("head_dim is no quotient", fields={"head_dim": 12}),
    Oddity("head_dim of qwen2", family="qwen2", fields={"head_dim": 12}),
    Oddity("as many kv heads as heads", config(num_key_value_heads=None), fields={"num_key_value_heads": 4}),
    Oddity("kv heads are not said", config(num_key_value_heads=...), fields={"num_key_value_heads": 4}),
    Oddity(
        "kv heads of mistral are not said", config(num_key_value_heads=...), "mistral",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4},
    ),
    Oddity("biases", fields=BIASES),
    Oddity("qwen2", family="qwen2"),
    Oddity("qwen2 with biases that it does not have", config(**BIASES), "qwen2"),
    Oddity("mistral without a window", config(sliding_window=None), "mistral"),
    Oddity("mistral with a window", config(sliding_window=5), "mistral"),
    Oddity(
        "mistral with a window by layer", config(sliding_window=5, layer_types=["full_attention", "sliding_attention",
        "sliding_attention"]), "mistral", LAYERS,
    ),
    Oddity("mistral that does not say which layers", config(sliding_window=5, layer_types=None), "mistral", LAYERS),
    Oddity("llama with a window that it does not have", config(sliding_window=5, layer_types=["sliding_attention"])),
    Oddity("mistral that does not say its window", config(sliding_window=...), "mistral"),
    Oddity("qwen2 with a window that is off", config(sliding_window=5, use_sliding_window=False), "qwen2"),
    Oddity(
        "qwen2 with a window from a layer on", config(sliding_window=5, use_sliding_window=True, max_window_layers=1,
        layer_types=...), "qwen2", LAYERS,
    ),
    Oddity(
        "qwen2 with a window by layer", config(sliding_window=5, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"]), "qwen2", LAYERS,
    ),
    Oddity("rope_theta beside the others", old_rope(500.0)),
    Oddity("linear by type", old_rope(type="linear", factor=4.0), tokens=200),
    Oddity("linear by rope_type", old_rope(rope_type="linear", factor=4.0), tokens=200),
    Oddity("linear", new_rope(rope_type="linear", factor=2.5), tokens=160),
    Oddity("yarn", new_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), tokens=200),
    Oddity("yarn without its original length", old_rope(type="yarn", factor=2.0), "qwen2", tokens=128),
    Oddity("llama3", new_rope(rope_type="llama3", **LLAMA3), tokens=64),
    Oddity("rope_type beside type", old_rope(rope_type="default", type="linear", factor=4.0)),
    Oddity("pretraining_tp", config(pretraining_tp=2)),
    Oddity("an architecture by its oldest name", config(architectures=["LLaMAForCausalLM"])),
    Oddity("no architecture", config(architectures=None)),
    Oddity("fields of others that change nothing", config(attn_logit_softcapping=None, residual_multiplier=1.0)),
]  # fmt: skip

REFUSED = [
    (Oddity("no lm_head", drop(HEAD)), HEAD),
    (Oddity("no embedding", drop(EMBEDDING)), EMBEDDING),
    (Oddity("tied, and neither is there", drop(EMBEDDING), fields=TIED), EMBEDDING),
    (Oddity("two names for one", tensors(lambda w: {**w, "norm.weight": w["model.norm.weight"] + 1})), "'norm.weight'"),
    (Oddity("a name in two shards", into_shards), EMBEDDING),
    (
        Oddity("a shard that is not there", index(lambda w: w.update(x="y.safetensors")), shards=True, fields=LAYERS),
        "y.safetensors: no such file",
    ),
    (Oddity("a pickle", as_pickle), r"pytorch_model.bin is a pickle.*save_pretrained"),
    (
        Oddity("integers", tensors(lambda w: {**w, "model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        "'model.norm.weight' is I8",
    ),
    (
        Oddity("float8", tensors(lambda w: {**w, HEAD: w[HEAD].to(torch.float8_e4m3fn)})),
        "'lm_head.weight' is F8_E4M3",
    ),
    (Oddity("biases that are not there", config(attention_bias=True)), "q_proj.bias"),
    (Oddity("more rows than there are", config(vocab_size=62)), r"shape \[61, 32\], the config implies \[62, 32\]"),
    (Oddity("more layers than there are", config(num_hidden_layers=2)), r"layers\.1"),
    (Oddity("2^31 rows", config(vocab_size=2**31 - 1)), "embed_tokens"),
    (
        Oddity("heads of 2^31", config(num_attention_heads=2**31 - 1, num_key_value_heads=1, head_dim=2**16)),
        "q_proj",
    ),
    (Oddity("2^40 layers", config(num_hidden_layers=2**40)), "num_hidden_layers"),
    *((Oddity(act, config(hidden_act=act)), "hidden_act") for act in ("gelu", "gelu_pytorch_tanh", "relu")),
    (Oddity("dynamic", old_rope(type="dynamic", factor=2.0)), "rope_scaling.type = 'dynamic'"),
    (Oddity("longrope", new_rope(rope_type="longrope", factor=2.0)), "rope_parameters.rope_type = 'longrope'"),
    (Oddity("half of a head", config(partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (Oddity("half of a head, inside", new_rope(partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (Oddity("frequencies that are infinite", new_rope(rope_type="yarn", factor=1e-300)), "rope_parameters"),
    (Oddity("code of its own", config(auto_map={"AutoModelForCausalLM": "modeling.X"})), "auto_map"),
    (Oddity("a classifier", config(architectures=["LlamaForSequenceClassification"])), "architectures"),
    (Oddity("pictures", config(architectures=["LlavaForConditionalGeneration"])), "architectures"),
    (Oddity("an adapter", lambda f: (f / "adapter_config.json").write_text("{}")), "adapter_config.json"),
    *(
        (Oddity(name, config(**{name: value})), name)
        for name, value in {
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
            "embedding_multiplier": 12.0, "logits_scaling": 8.0, "is_causal": False, "text_config": {},
            "quantization_config": {"quant_method": "fp8"}, "num_local_experts": 8, "use_qk_norm": True,
        }.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize("oddity", FOLLOWED, ids=lambda oddity: oddity.name)
def test_the_logits_are_those_of_transformers(tmp_path, oddity):
    folder = oddity.write(tmp_path / "model")
    ids = random_token_ids(oddity.tokens, SMALL["vocab_size"])
    with LocalGpus(folder).llm(dtype="float32", max_model_len=oddity.tokens, max_num_seqs=1) as llm:
        logits = llm.logits(list(ids))
    assert relative_distance(logits, transformers_logits(folder, ids)) < 1e-4


@pytest.mark.parametrize(("oddity", "named"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_what_is_not_followed_is_refused_by_name(tmp_path, oddity, named):
    folder = oddity.write(tmp_path / "model")
    with pytest.raises((UnsupportedModel, ModelFileError), match=named):
        LocalGpus(folder).llm(dtype="float32", max_num_seqs=1)


def test_what_is_tied_is_a_part_of_the_plan(tmp_path):
    tied = Oddity("tied", fields=TIED).write(tmp_path / "tied")
    wrong = Oddity("wrong", config(**TIED)).write(tmp_path / "wrong")
    geometries = [Geometry.of(Network.of(ModelSpec.from_folder(folder))) for folder in (tied, wrong)]
    assert [geometry.is_tied for geometry in geometries] == [True, False]


def test_a_stretched_context_is_the_longest_that_may_be_asked_for(tmp_path):
    folder = Oddity("linear", new_rope(rope_type="linear", factor=4.0)).write(tmp_path / "model")
    spec = ModelSpec.from_folder(folder)
    assert (spec.max_position_embeddings, spec.max_positions) == (64, 256)
    with pytest.raises(Exception, match="at most the model's 256 positions"):
        LocalGpus(folder).llm(max_model_len=257)


def test_a_tensor_is_the_process_s_own(tmp_path):
    """Neither an overwritten nor a truncated file changes what was read."""
    folder = Oddity("any").write(tmp_path / "model")
    ids = list(random_token_ids(5, SMALL["vocab_size"]))
    with LocalGpus(folder).llm(dtype="float32", max_num_seqs=1) as llm:
        before = llm.logits(ids)
        with (folder / WEIGHTS).open("r+b") as file:
            file.write(b"\xff" * 4096)
            file.truncate(8)
        np.testing.assert_array_equal(llm.logits(ids), before)
