"""Random weights of known architectures, as Hugging Face folders: a speed needs no trained model.

The weights are a pool of normal values, repeated: what a product of matrices costs does not depend on them, and
drawing each anew would take minutes for 8B parameters.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tsqp_shm.errors import ConfigError, ModelFileError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import INDEX_FILE, float32_to_bfloat16, write_safetensors

Bits = npt.NDArray[np.uint16]

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA_3,
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "head_dim": 64,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA_3,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "head_dim": 128,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "llama-3.1-70b": {
        **_LLAMA_3,
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_attention_heads": 64,
        "head_dim": 128,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
}

# Prime, so that rows of no width begin with the same values.
_POOL_VALUES = 1_048_583
_STANDARD_DEVIATION = 0.02


def shape_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of an architecture, or of its first layers.

    Raises:
        ConfigError: no such shape, or more layers than it has.
    """
    if name not in SHAPES:
        raise ConfigError("shape", name, ", ".join(SHAPES))
    config = {**SHAPES[name], "dtype": "bfloat16", "eos_token_id": None, "bos_token_id": None}
    most = int(config["num_hidden_layers"])
    if layers is not None and not 1 <= layers <= most:
        raise ConfigError("layers", layers, f"a whole number from 1 to {most}, as {name} has {most}")
    config["num_hidden_layers"] = layers or most
    return config


def write_shape(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json and weights, one file for each layer and one for the rest.

    Raises:
        ModelFileError: the folder's disk has no room.
    """
    network = Network.of(ModelSpec.from_config(config))
    shards = [dict(network.outer_tensors()), *(dict(layer.tensors()) for layer in network.layers)]
    needed = 2 * sum(math.prod(shape) for shapes in shards for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        reason = f"needs {needed:,} bytes for random weights, {free:,} are free; set TMPDIR, or take fewer --layers"
        raise ModelFileError(folder, reason)
    (folder / "config.json").write_text(json.dumps(config))
    values = np.random.default_rng(0).standard_normal(_POOL_VALUES, np.float32)
    pool = float32_to_bfloat16(values * np.float32(_STANDARD_DEVIATION))
    one = float32_to_bfloat16(np.ones(1, np.float32))
    weight_map = {}
    for number, shapes in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        write_safetensors(
            folder / file,
            {name: np.resize(one if "norm" in name else pool, shape) for name, shape in shapes.items()},
        )
        weight_map.update(dict.fromkeys(shapes, file))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": needed}, "weight_map": weight_map}))
