"""The part of a tokenizer that makes text of tokens: what of it the TEE process does not run.

Decoding is done there, for each token. What a decoder takes has to be bounded by its form, as nothing else bounds it.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from tsqp_shm.errors import ModelFileError
from tsqp_shm.model.json_fields import brief


def require_bounded(decoder: tokenizers.decoders.Decoder | None, path: Path) -> None:
    """No converter of transformers makes a decoder that is refused here.

    Args:
        path: of its tokenizer.json, for messages.

    Raises:
        ModelFileError: it holds an expression, which may backtrack without end; a replacement that is longer than what
            it replaces, a few of which make a text of any size; or a cut at the end, at which the library panics where
            a text has nothing else.
    """
    # As the library has read it, which a second reading of the file might differ from.
    left = [("decoder", json.loads(decoder.__getstate__()))] if decoder is not None else []
    while left:
        field, content = left.pop()
        if content["type"] == "Sequence":
            left += [(f"{field}.decoders[{index}]", part) for index, part in enumerate(content["decoders"])]
        elif content["type"] == "Replace":
            pattern = content["pattern"].get("String")
            if pattern is None:
                raise ModelFileError(path, f"{field}.pattern is a Regex; supported: a String")
            if len(content["content"]) > len(pattern):
                reason = f"{field}.content is longer than the {brief(pattern)!r} that it replaces"
                raise ModelFileError(path, f"{reason}; supported: at most as long")
        elif content["type"] == "Strip" and content["stop"]:
            raise ModelFileError(path, f"{field}.stop is {brief(content['stop'])}; supported: 0")
