"""ModelSpec means what the config classes of transformers mean, and refuses the rest in one clear line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG_CLASSES

from tsqp_shm.errors import ConfigError, ModelFileError, TsqpError, UnsupportedModel
from tsqp_shm.model.spec import ModelSpec, RopeSpec

GEOMETRY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
FAMILIES = tuple(CONFIG_CLASSES)


def config_of(family, **fields):
    return {"model_type": family, **GEOMETRY, "num_key_value_heads": 2, **fields}


def transformers_config(family, fields):
    return CONFIG_CLASSES[family](**{name: value for name, value in fields.items() if name != "model_type"})


def window_of_each_layer(config):
    if config.model_type == "llama":
        return (None,) * config.num_hidden_layers
    if config.model_type == "mistral":
        return (config.sliding_window,) * config.num_hidden_layers
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


def assert_same(spec, config):
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    eos = config.eos_token_id
    assert spec.family == config.model_type
    assert spec.num_layers == config.num_hidden_layers
    assert spec.hidden_size == config.hidden_size
    assert spec.intermediate_size == config.intermediate_size
    assert spec.num_heads == config.num_attention_heads
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == head_dim
    assert spec.vocab_size == config.vocab_size
    assert spec.max_position_embeddings == config.max_position_embeddings
    assert spec.rms_norm_eps == config.rms_norm_eps
    assert spec.tie_word_embeddings == config.tie_word_embeddings
    assert spec.windows == window_of_each_layer(config)
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.rope.kind == config.rope_parameters["rope_type"]
    assert spec.bos_token_id == config.bos_token_id
    assert spec.eos_token_ids == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])


def optional(strategy):
    return st.none() | strategy


ropes = st.one_of(
    st.just({"rope_type": "default"}),
    st.builds(lambda factor: {"rope_type": "linear", "factor": factor}, st.floats(1, 8)),
    st.just({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
    st.just(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    ),
)


@st.composite
def configs(draw):
    """A config as a checkpoint may hold it: any optional field may be absent."""
    family = draw(st.sampled_from(FAMILIES))
    kv_heads, groups, head_dim = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        4 * draw(st.integers(2, 8)),
    )
    fields = {
        "model_type": family,
        "num_hidden_layers": draw(st.integers(1, 6)),
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "hidden_size": kv_heads * groups * head_dim,
        "intermediate_size": 4 * draw(st.integers(1, 50)),
        "vocab_size": draw(st.integers(10, 1000)),
    }
    optional_fields = {
        "head_dim": st.integers(1, 8).map(lambda words: 4 * words),
        "max_position_embeddings": st.integers(1024, 9999),
        "rms_norm_eps": st.floats(1e-8, 1e-3),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "sliding_window": optional(st.integers(1, 99)),
        "use_sliding_window": st.booleans(),
        "max_window_layers": st.integers(0, 7),
        "bos_token_id": optional(st.integers(0, 9)),
        "eos_token_id": optional(st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3)),
    }
    for name, strategy in optional_fields.items():
        if draw(st.booleans()):
            fields[name] = draw(strategy)
    rope, theta = draw(ropes), draw(st.floats(100, 1e6))
    if draw(st.booleans()):
        fields["rope_parameters"] = {**rope, "rope_theta": theta}
    else:
        fields["rope_theta"] = theta
        if rope["rope_type"] != "default":
            fields["rope_scaling"] = rope
    return family, fields


@settings(deadline=None, max_examples=150)
@given(configs())
def test_a_config_means_what_it_means_in_transformers(case):
    family, fields = case
    spec = ModelSpec.from_config(json.loads(json.dumps(fields)))
    assert_same(spec, transformers_config(family, json.loads(json.dumps(fields))))


@settings(deadline=None, max_examples=100)
@given(configs())
def test_a_config_saved_by_transformers_gives_the_same_spec(case):
    family, fields = case
    spec = ModelSpec.from_config(json.loads(json.dumps(fields)))
    saved = transformers_config(family, fields).to_dict()
    assert ModelSpec.from_config(saved) == spec


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_have_the_defaults_of_the_transformers_class(family):
    fields = {"model_type": family, **GEOMETRY, "num_attention_heads": 32, "hidden_size": 256}
    assert_same(ModelSpec.from_config(fields), transformers_config(family, fields))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_biases_are_those_of_the_transformers_model(family, attention_bias, mlp_bias):
    from transformers import AutoModelForCausalLM

    fields = config_of(family, attention_bias=attention_bias, mlp_bias=mlp_bias)
    names = set(AutoModelForCausalLM.from_config(transformers_config(family, fields)).state_dict())
    spec = ModelSpec.from_config(fields)
    layer = "model.layers.0."
    assert spec.qkv_bias == (f"{layer}self_attn.q_proj.bias" in names)
    assert spec.o_bias == (f"{layer}self_attn.o_proj.bias" in names)
    assert spec.mlp_bias == (f"{layer}mlp.down_proj.bias" in names)


def test_both_forms_of_the_rope_parameters_give_the_same_spec():
    scaling = {"factor": 2.0}
    legacy = config_of("llama", rope_theta=5e5, rope_scaling={"type": "linear", **scaling})
    current = config_of("llama", rope_parameters={"rope_type": "linear", "rope_theta": 5e5, **scaling})
    expected = RopeSpec("linear", 5e5, factor=2.0)
    assert ModelSpec.from_config(legacy).rope == ModelSpec.from_config(current).rope == expected


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths():
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    spec = ModelSpec.from_config(config_of("llama", max_position_embeddings=2048, rope_scaling=rope))
    assert spec.rope.factor == 4.0


def test_qwen2_layer_types_choose_the_layers_with_a_window():
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    fields = config_of("qwen2", use_sliding_window=True, sliding_window=7, layer_types=layer_types)
    assert ModelSpec.from_config(fields).windows == (7, None, 7)


@pytest.mark.parametrize("field", [*GEOMETRY, "model_type"])
def test_a_missing_field_of_the_geometry_is_named(field):
    fields = config_of("llama")
    del fields[field]
    with pytest.raises(ConfigError, match=f"{field}.*missing"):
        ModelSpec.from_config(fields)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("model_type", {"model_type": "gpt2"}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("quantization_config", {"quantization_config": {"bits": 4}}),
        ("num_local_experts", {"num_local_experts": 8}),
        ("num_experts", {"num_experts": 8}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("head_dim", {"head_dim": 18}),
        ("hidden_size", {"hidden_size": 4098}),
        ("intermediate_size", {"intermediate_size": 131}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("rope_scaling.type", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "longrope"}}),
        ("rope_parameters.rope_type", {"rope_parameters": {"rope_type": ["yarn"]}}),
        ("rope_parameters.full_attention", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
        ("rope_parameters.partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.25}}),
        (
            "layer_types",
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3, "use_sliding_window": False},
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_field_and_value(field, fields):
    with pytest.raises(UnsupportedModel) as caught:
        ModelSpec.from_config({**config_of("llama"), **fields})
    assert caught.value.field == field
    assert caught.value.supported


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", 2**40),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("vocab_size", None),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0),
        ("rope_theta", float("inf")),
        ("rope_theta", 10**400),
        ("rope_theta", 1.0),
        ("rope_scaling", [1]),
        ("tie_word_embeddings", 1),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", -1),
        ("bos_token_id", -5),
        ("max_position_embeddings", 0),
    ],
)
def test_a_wrong_type_or_size_is_named(field, value):
    with pytest.raises(ConfigError) as caught:
        ModelSpec.from_config(config_of("llama", **{field: value}))
    assert caught.value.field == field
    assert len(str(caught.value)) < 300


def test_a_hidden_size_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"hidden_size: .*a multiple of num_attention_heads = 6"):
        ModelSpec.from_config(config_of("llama", num_attention_heads=6))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    *config_of("llama"),
    *("head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "hidden_act", "bos_token_id", "eos_token_id", "partial_rotary_factor"),
]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(FAMILIES), st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_garbage_in_a_field_never_ends_in_another_kind_of_error(family, garbage):
    try:
        ModelSpec.from_config({**config_of(family), **garbage})
    except TsqpError as error:
        assert len(str(error)) < 500


ROPE_FIELDS = [
    *("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
]
rope_values = st.dictionaries(st.sampled_from(ROPE_FIELDS), json_values)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["default", "linear", "llama3", "yarn"]), rope_values)
def test_garbage_in_the_rope_parameters_never_ends_in_another_kind_of_error(kind, garbage):
    try:
        ModelSpec.from_config(config_of("llama", rope_parameters={"rope_type": kind, **garbage}))
    except TsqpError as error:
        assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1, 2]", "expected a JSON object, found a list"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "JSON|config.json"),
        (b'{"model_type": "llama"}', "num_hidden_layers"),
    ],
)
def test_a_broken_config_file_is_a_model_file_error(tmp_path, content, reason):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=reason) as caught:
        ModelSpec.from_folder(tmp_path)
    assert caught.value.path == str(tmp_path / "config.json")


def test_a_missing_folder_and_a_missing_config_are_told_apart(tmp_path):
    with pytest.raises(ModelFileError, match="not a folder"):
        ModelSpec.from_folder(tmp_path / "nowhere")
    with pytest.raises(ModelFileError, match=r"config\.json: no such file"):
        ModelSpec.from_folder(tmp_path)


@pytest.mark.parametrize(
    "generation",
    [None, {}, {"eos_token_id": 5}, {"eos_token_id": [5, 6]}, {"eos_token_id": None}, {"temperature": 0.5}],
)
@pytest.mark.parametrize("eos", [2, [3, 4]])
def test_the_end_of_generation_is_that_of_transformers(tmp_path, generation, eos):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(transformers_config("llama", config_of("llama", eos_token_id=eos))).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    expected = tuple(theirs if isinstance(theirs, list) else [] if theirs is None else [theirs])
    assert ModelSpec.from_folder(tmp_path).eos_token_ids == expected


def test_a_broken_generation_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ModelFileError, match=r"generation_config\.json: eos_token_id"):
        ModelSpec.from_folder(tmp_path)
