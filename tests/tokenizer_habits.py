"""What programs ask of a tokenizer of transformers, all of it, to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
NAMES = (
    *(f"{role}_token{ending}" for role in ROLES for ending in ("", "_id")),
    "special_tokens_map", "extra_special_tokens", "all_special_tokens", "all_special_ids",
    "vocab_size", "is_fast", "name_or_path", "model_max_length", "model_input_names",
)  # fmt: skip


def habits(tokenizer: Any, texts: Sequence[str]) -> dict[str, object]:
    """What it answers; equal answers mean the same to a program."""
    texts = list(texts)
    ids = [tokenizer.encode(text) for text in texts]
    tokens = [tokenizer.convert_ids_to_tokens(each) for each in ids]
    return {
        "encode": ids,
        "encode several": tokenizer.encode(texts),
        "encode bare": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        "call": [dict(tokenizer(text, padding=False, truncation=False)) for text in texts],
        "call several": dict(tokenizer(texts, return_token_type_ids=True)),
        "attribute": [tokenizer(text, return_attention_mask=False).input_ids for text in texts],
        "decode": [tokenizer.decode(each) for each in ids],
        "decode visible": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
        "decode several": tokenizer.decode([each for each in ids if each]),
        "decode one": [tokenizer.decode(each[-1]) for each in ids if each],
        "batch_decode": tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False),
        "tokenize": [tokenizer.tokenize(text) for text in texts],
        "convert_ids_to_tokens": tokens,
        "visible tokens": [tokenizer.convert_ids_to_tokens(each, skip_special_tokens=True) for each in ids],
        "one token": [tokenizer.convert_ids_to_tokens(each[0]) for each in ids if each],
        "convert_tokens_to_ids": [tokenizer.convert_tokens_to_ids([*each, "no such token"]) for each in tokens],
        "one id": tokenizer.convert_tokens_to_ids("no such token"),
        "size": len(tokenizer),
        "get_vocab": tokenizer.get_vocab(),
        **{name: getattr(tokenizer, name) for name in NAMES},
    }
