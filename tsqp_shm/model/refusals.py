"""The fields of a config.json that change the arithmetic and that nothing else reads: refused, never passed over."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tsqp_shm.errors import UnsupportedModel
from tsqp_shm.model.json_fields import JsonFields, brief

# Both are nn.SiLU in transformers' table.
_SILU = ("silu", "swish")

# Fields of other families that change the arithmetic, and the values with which they do not. transformers' classes for
# the families here pass them over: who set one meant another graph.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_causal": (True,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "no_rope_layers": (),
    "num_experts": (),
    "num_local_experts": (),
    "n_routed_experts": (),
    "pruned_heads": ({}, []),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "scale_emb": (1,),
    "text_config": (),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}


def refuse_unsupported(fields: JsonFields, model_type: str) -> None:
    """Raises:
    UnsupportedModel: a field asks for what this runtime does not do.
    """
    if fields.raw("hidden_act", "silu") not in _SILU:
        raise UnsupportedModel("hidden_act", brief(fields.raw("hidden_act")), " or ".join(_SILU))
    for name, neutral in _NEUTRAL.items():
        if fields.raw(name) is not None and fields.raw(name) not in neutral:
            supported = f"no such field, or {json.dumps(neutral[0])}" if neutral else "no such field"
            raise UnsupportedModel(name, brief(fields.raw(name)), supported)
    if fields.raw("auto_map"):
        raise UnsupportedModel("auto_map", brief(fields.raw("auto_map")), "models without code of their own")
    _require_architecture(fields.raw("architectures"), model_type)


def _require_architecture(architectures: object, model_type: str) -> None:
    """Raises for what was saved of another class: a classifier's file has no lm_head, another model's another graph."""
    if not architectures:
        return
    names = architectures if isinstance(architectures, list) else [architectures]
    known = {f"{model_type}forcausallm", f"{model_type}model"}
    if not any(isinstance(name, str) and name.lower() in known for name in names):
        found = ", ".join(str(brief(name)) for name in names[:4])
        raise UnsupportedModel("architectures", brief(found), f"{model_type.capitalize()}ForCausalLM")
