"""What a model folder says of itself, by its config, its headers and its small files; no weight is read."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsqp_shm.errors import ConfigError, ModelFileError, RequestError, TsqpError
from tsqp_shm.model.added_tokens import CONFIG_FILE
from tsqp_shm.model.chat_template import TEMPLATE_FILE
from tsqp_shm.model.files import is_there
from tsqp_shm.model.generation_config import GENERATION_CONFIG_FILE, sampling_fields
from tsqp_shm.model.json_fields import brief, read_json_object
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import TOKENIZER_FILE, Tokenizer
from tsqp_shm.model.weights import Checkpoint

# Values by their names in JSON.
Facts = dict[str, Any]
_TRIAL = [{"role": "user", "content": "Hello"}]


def describe_config(folder: Path) -> Facts:
    """What config.json calls the model, whether or not it is one that is followed.

    Raises:
        ModelFileError: there is no config.json, or it is no JSON object.
    """
    if not folder.is_dir():
        raise ModelFileError(folder, "not a folder; expected one with config.json and safetensors weights")
    config = read_json_object(folder / "config.json")
    architectures = config.get("architectures")
    return {
        "name": folder.resolve().name,
        "family": brief(config.get("model_type")),
        "architectures": [brief(name) for name in architectures[:4]] if isinstance(architectures, list) else [],
    }


def describe_checkpoint(folder: Path) -> Facts:
    """Raises:
    ModelFileError: there are no weights, or a header is malformed.
    """
    dtypes: dict[str, int] = {}
    with Checkpoint.open(folder) as checkpoint:
        names = checkpoint.names()
        for tensor in filter(None, map(checkpoint.stored, names)):
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.size_bytes
    return {"tensors": len(names), "bytes": sum(dtypes.values()), "bytes_by_dtype": dtypes}


def read_network(folder: Path) -> tuple[ModelSpec, Network]:
    """Raises:
    ModelFileError, UnsupportedModel: it is not a model that is followed; the message names the field.
    """
    spec = ModelSpec.from_folder(folder)
    return spec, Network.of(spec)


def embedding_bytes(folder: Path, network: Network) -> int:
    """What the embedding takes as it is stored.

    Raises:
        ModelFileError: a tensor of the network is not there, or has another shape or dtype.
    """
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.require(network.tensors())
        stored = checkpoint.stored(network.embedding.weight)
        assert stored is not None
        return stored.size_bytes


def describe_network(spec: ModelSpec, network: Network) -> Facts:
    """The model as it is followed."""
    biased = sorted({linear.role for linear in network.linears if any(part.bias is not None for part in linear.parts)})
    return {
        "layers": network.num_layers,
        "hidden_size": network.hidden_size,
        "intermediate_size": network.intermediate_size,
        "num_heads": network.num_heads,
        "num_kv_heads": network.num_kv_heads,
        "head_dim": network.head_dim,
        "vocab_size": network.vocab_size,
        "is_tied": network.is_tied,
        "linears_with_bias": biased,
        "parameters": sum(math.prod(shape) for _, shape in network.tensors()),
        "max_position_embeddings": spec.max_position_embeddings,
        "max_positions": spec.max_positions,
        "rope": asdict(spec.rope),
        "windows": list(network.windows),
        "eos_token_ids": list(spec.eos_token_ids),
    }


def describe_text(folder: Path) -> Facts:
    """Tokenizer, chat template and sampling: what is there, and why it is refused where it is.

    Each is tried as a session would, in the confined process.
    """
    return {**_describe_tokenizer(folder), "sampling": _tried(lambda: sampling_fields(folder), folder)}


def _describe_tokenizer(folder: Path) -> Facts:
    if not is_there(folder / TOKENIZER_FILE):
        return {"tokenizer": None, "chat_template": None}
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except TsqpError as error:
        return {"tokenizer": {"file": TOKENIZER_FILE, "refused": str(error)}, "chat_template": None}
    try:
        return {"tokenizer": {"file": TOKENIZER_FILE, "refused": None}, "chat_template": _template(folder, tokenizer)}
    finally:
        tokenizer.close()


def _template(folder: Path, tokenizer: Tokenizer) -> Facts | None:
    file = TEMPLATE_FILE if is_there(folder / TEMPLATE_FILE) else CONFIG_FILE
    try:
        tokenizer.apply_chat_template(_TRIAL)
    except TsqpError as error:
        # The one error of a model that has none; what a template refuses is a RequestError.
        if isinstance(error, ConfigError) and not isinstance(error, RequestError):
            return None
        return {"file": file, "refused": str(error)}
    return {"file": file, "refused": None}


def _tried(read: Any, folder: Path) -> Facts | None:
    if not is_there(folder / GENERATION_CONFIG_FILE):
        return None
    try:
        return {"file": GENERATION_CONFIG_FILE, "fields": read(), "refused": None}
    except TsqpError as error:
        return {"file": GENERATION_CONFIG_FILE, "fields": {}, "refused": str(error)}
