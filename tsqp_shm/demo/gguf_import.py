"""Converts a GGUF file of a small Llama with SmolLM's tokenizer into a Hugging Face folder in bfloat16.

Source: transformers' own GGUF import, tensor for tensor. It is not used: it takes 22 s at every start,
needs torch and accelerate, and loses SmolLM's rule that digits are split one by one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp_shm.errors import UnsupportedModel
from tsqp_shm.model.weights import SINGLE_FILE, float32_to_bfloat16, write_safetensors

_SPECIAL_TOKEN = 3  # the value of tokenizer.ggml.token_type for a control token
_TENSORS_PER_LINE = 34

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def convert_gguf(source: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Writes the model into an existing folder; all of it is on the disk when this returns.

    Raises:
        UnsupportedModel: another architecture or another tokenizer.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = (fields.get("general.architecture"), fields.get("tokenizer.ggml.pre"))
    if found != ("llama", "smollm"):
        raise UnsupportedModel("(general.architecture, tokenizer.ggml.pre)", found, "('llama', 'smollm')")

    _write(folder / "tokenizer.json", _tokenizer(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    _write_json(folder / "config.json", _config(fields))
    tokens = {f"{name}_token_id": _token_id(fields, name) for name in ("bos", "eos", "pad")}
    _write_json(folder / "generation_config.json", tokens)
    write_safetensors(folder / SINGLE_FILE, _weights(reader, fields, progress))


def _config(fields: dict[str, Any]) -> dict[str, object]:
    theta = fields["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": fields["llama.block_count"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF stores float32: 9.99999974e-06 was 1e-05.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        # Both forms, so that readers from before `rope_parameters` find theirs.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "bos_token_id": _token_id(fields, "bos"),
        "eos_token_id": _token_id(fields, "eos"),
        "pad_token_id": _token_id(fields, "pad"),
        "torch_dtype": "bfloat16",
    }


def _tokenizer(fields: dict[str, Any]) -> str:
    """Returns tokenizer.json: byte-level BPE in which every digit is a word of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    text: str = tokenizer.to_str(pretty=True)
    return text


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, object]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer would bring its own rule for digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[_token_id(fields, "bos")],
        "eos_token": tokens[_token_id(fields, "eos")],
        "pad_token": tokens[_token_id(fields, "pad")],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def _token_id(fields: dict[str, Any], name: str) -> int:
    key = "padding" if name == "pad" else name
    return int(fields[f"tokenizer.ggml.{key}_token_id"])


def _weights(reader: Any, fields: dict[str, Any], progress: Callable[[str], None]) -> dict[str, NDArray[np.uint16]]:
    from gguf import dequantize

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights: dict[str, NDArray[np.uint16]] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        values = dequantize(tensor.data, tensor.tensor_type)
        short_name = tensor.name.split(".")[-2]
        if short_name in heads:
            values = _unpermute(values, heads[short_name])
        weights[_hugging_face_name(tensor.name)] = float32_to_bfloat16(values)
        if done % _TENSORS_PER_LINE == 0 or done == len(reader.tensors):
            progress(f"converting {done}/{len(reader.tensors)} tensors")
    return weights


def _hugging_face_name(name: str) -> str:
    """Returns model.layers.3.self_attn.q_proj.weight for blk.3.attn_q.weight."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return f"{_NAMES[parts[0]]}.{parts[1]}"


def _unpermute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Returns a query or key projection for a rotary embedding that pairs dimension i with i + D/2.

    llama.cpp pairs 2i with 2i + 1 and stores the rows in that order.

    Shapes: weight [num_heads * D, C].
    """
    rows, columns = weight.shape
    by_pair = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return by_pair.swapaxes(1, 2).reshape(rows, columns)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
