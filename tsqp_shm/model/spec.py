"""The geometry of a model, read from its config.json.

Families are data: a family is a row of `_FAMILIES`, and everything else is one code path. The defaults for
absent fields are those of the family's config class in transformers: a checkpoint means the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tsqp_shm.errors import ConfigError, ModelFileError, UnsupportedModel
from tsqp_shm.model.files import ModelFiles, is_there
from tsqp_shm.model.json_fields import JsonFields, brief, read_model_json
from tsqp_shm.model.refusals import refuse_unsupported
from tsqp_shm.model.rope import RopeSpec, require_finite
from tsqp_shm.model.weights import INDEX_FILE, SINGLE_FILE, Checkpoint

__all__ = ["ModelSpec", "RopeSpec"]

# Four bfloat16 elements are a word of the arena, and a row begins with one.
_WORD_ELEMENTS = 4

# One entry per layer is kept (`ModelSpec.windows`), so the number needs a bound that memory can take.
_MAX_LAYERS = 4096
# A frequency is computed for each pair of dimensions, before the weights are looked at.
_MAX_HEAD_DIM = 1 << 16

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"


@dataclass(frozen=True)
class ModelSpec:
    """What decides the shapes and the arithmetic of a forward pass.

    Attributes:
        family: the config's model_type.
        windows: the sliding window of each layer: query i sees key j if and only if 0 <= i - j < window.
            None: it sees every earlier key.
        tie_word_embeddings: whether lm_head and the embedding are one matrix.
        embedding_weight: the name of the embedding's matrix.
        qkv_bias: whether q_proj, k_proj and v_proj have a bias.
        eos_token_ids: any of these ends a generation.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    embedding_weight: str = EMBEDDING_WEIGHT

    @property
    def max_positions(self) -> int:
        """How many may be asked for: a rotary embedding that is stretched reaches further than its config states."""
        return max(self.max_position_embeddings, self.rope.reach(self.max_position_embeddings))

    @classmethod
    def from_folder(cls, folder: Path | ModelFiles) -> ModelSpec:
        """Reads config.json and, if they exist, generation_config.json, for the tokens that end a generation, and the
        headers of the weights, for what is tied.

        Raises:
            ModelFileError: a file is missing, not JSON, or a field is missing or malformed.
            UnsupportedModel: a field asks for what this runtime does not do.
        Source: transformers' `generate`, where a generation_config.json hides the eos of config.json even if
            it names none itself.
        """
        files = ModelFiles.of(folder)
        folder = files.folder
        if not folder.is_dir():
            raise ModelFileError(folder, "not a folder; expected one with config.json and safetensors weights")
        if is_there(folder / "adapter_config.json"):
            raise UnsupportedModel("adapter_config.json", "a file of the folder", "models with their adapter merged")
        name = "config.json"
        try:
            config = read_model_json(files, name)
            if files.has("generation_config.json"):
                spec = cls.from_config({**config, "eos_token_id": None})
                name = "generation_config.json"
                spec = replace(spec, eos_token_ids=JsonFields(read_model_json(files, name)).integers("eos_token_id"))
            else:
                spec = cls.from_config(config)
        except ConfigError as error:
            raise ModelFileError(files.path(name), str(error)) from error
        if not any(is_there(folder / name) for name in (SINGLE_FILE, INDEX_FILE)):
            return spec
        with Checkpoint.open(folder) as checkpoint:
            return spec.of_checkpoint(checkpoint)

    def of_checkpoint(self, checkpoint: Checkpoint) -> ModelSpec:
        """What is tied by the weights that are there: a config that says tied beside both matrices is wrong, and where
        only lm_head's is there, it is the embedding too.

        Source: transformers' `PreTrainedModel.tie_weights`, which ties two equal ones: the logits are the same.
        """
        if not self.tie_word_embeddings or HEAD_WEIGHT not in checkpoint:
            return self
        if EMBEDDING_WEIGHT in checkpoint:
            return replace(self, tie_word_embeddings=False)
        return replace(self, embedding_weight=HEAD_WEIGHT)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ModelSpec:
        """Reads the content of a config.json.

        Raises:
            ConfigError: a field is missing or malformed.
            UnsupportedModel: a field asks for what this runtime does not do.
        """
        fields = JsonFields(config)
        model_type = fields.text("model_type")
        family = _FAMILIES.get(model_type)
        if family is None:
            raise UnsupportedModel("model_type", brief(model_type), ", ".join(_FAMILIES))
        refuse_unsupported(fields, model_type)

        num_layers = fields.count("num_hidden_layers", maximum=_MAX_LAYERS)
        num_heads = fields.count("num_attention_heads")
        hidden_size = _width("hidden_size", fields.count("hidden_size"))
        head_dim = _head_dim(fields, hidden_size, num_heads)
        max_position_embeddings = fields.count("max_position_embeddings", family.max_position_embeddings)
        rope = RopeSpec.from_fields(fields, max_position_embeddings)
        require_finite(rope, head_dim)
        bos_token_id = fields.optional_count("bos_token_id", family.bos_token_id, minimum=0)
        return cls(
            family=model_type,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=_width("intermediate_size", fields.count("intermediate_size")),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(fields, family, num_heads),
            head_dim=head_dim,
            vocab_size=fields.count("vocab_size"),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=rope,
            windows=_windows(fields, family, num_layers),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            qkv_bias=_choice(fields, family.qkv_bias),
            o_bias=_choice(fields, family.o_bias),
            mlp_bias=_choice(fields, family.mlp_bias),
            bos_token_id=bos_token_id,
            eos_token_ids=fields.integers("eos_token_id", family.eos_token_id),
        )


@dataclass(frozen=True)
class _Family:
    """What a model_type fixes, and the defaults of its config class where they differ between families.

    Attributes:
        num_kv_heads: None: as many as there are query heads.
        qkv_bias, o_bias, mlp_bias: fixed, or the name of the config field that decides.
        sliding_window: None: the family has no window, whatever the config says.
        window_switch: the field that turns the window on; None: it is on unless `sliding_window` is null.
        windows_after: the field that says how many layers have none, unless `layer_types` does; None: all have it.
    """

    max_position_embeddings: int
    num_kv_heads: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    sliding_window: int | None = None
    window_switch: str | None = None
    windows_after: str | None = None


_FAMILIES = {
    "llama": _Family(
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": _Family(
        max_position_embeddings=131_072,
        num_kv_heads=8,
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=4096,
    ),
    "qwen2": _Family(
        max_position_embeddings=32_768,
        num_kv_heads=32,
        qkv_bias=True,
        sliding_window=4096,
        window_switch="use_sliding_window",
        windows_after="max_window_layers",
    ),
}


def _choice(fields: JsonFields, choice: bool | str) -> bool:
    return fields.flag(choice, False) if isinstance(choice, str) else choice


def _num_kv_heads(fields: JsonFields, family: _Family, num_heads: int) -> int:
    num_kv_heads = fields.optional_count("num_key_value_heads", family.num_kv_heads) or num_heads
    if num_heads % num_kv_heads:
        raise UnsupportedModel("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}")
    return num_kv_heads


def _head_dim(fields: JsonFields, hidden_size: int, num_heads: int) -> int:
    head_dim = fields.optional_count("head_dim")
    if head_dim is None:
        head_dim, rest = divmod(hidden_size, num_heads)
        if rest or not head_dim:
            raise ConfigError("hidden_size", hidden_size, f"a multiple of num_attention_heads = {num_heads}")
    if head_dim > _MAX_HEAD_DIM:
        raise UnsupportedModel("head_dim", head_dim, f"at most {_MAX_HEAD_DIM}")
    return _width("head_dim", head_dim)


def _width(name: str, elements: int) -> int:
    """Rows in shared memory are read by whole words of 8 bytes, which no row may share with the next."""
    if elements % _WORD_ELEMENTS:
        raise UnsupportedModel(name, elements, f"a multiple of {_WORD_ELEMENTS}")
    return elements


def _windows(fields: JsonFields, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    window = None
    if family.sliding_window is None:
        return (None,) * num_layers
    if family.window_switch is None or fields.flag(family.window_switch, False):
        window = fields.optional_count("sliding_window", family.sliding_window)

    # A Mistral with layer_types is a Ministral to transformers, which differs in nothing else.
    layer_types = fields.raw("layer_types")
    if layer_types is None:
        num_full = 0 if family.windows_after is None else fields.count(family.windows_after, 28, minimum=0)
        return tuple(window if layer >= num_full else None for layer in range(num_layers))
    # A sliding layer without a window would silently become a full one.
    known = ["full_attention"] if window is None else ["full_attention", "sliding_attention"]
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ConfigError("layer_types", brief(layer_types), f"a list with one entry for each of {num_layers} layers")
    for layer_type in layer_types:
        if layer_type not in known:
            switch = "" if family.window_switch is None else f" and {family.window_switch}"
            hint = "" if window else f" (no sliding window: see sliding_window{switch})"
            raise UnsupportedModel("layer_types", brief(layer_type), " or ".join(known) + hint)
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
