"""The part of a tokenizer that makes text of tokens: what of it the TEE process does not run.

Decoding is done there, for each token. What a decoder takes has to be bounded by its form, as nothing else bounds it.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from tsqp_shm.errors import ModelFileError
from tsqp_shm.model.json_fields import brief

# Real ones have at most five.
_MOST_PARTS = 32
# Of BPEDecoder and CTC.
_REPLACED_BY_A_SPACE = ("suffix", "word_delimiter_token")


def require_bounded(decoder: tokenizers.decoders.Decoder | None, path: Path) -> None:
    """No converter of transformers makes a decoder that is refused here.

    Args:
        path: of its tokenizer.json, for messages.

    Raises:
        ModelFileError: it holds an expression, which may backtrack without end; a replacement that is longer than what
            it replaces, a few of which make a text of any size; a cut at the end, at which the library panics where
            a text has nothing else; or more parts than any real one.
    """
    num_parts = 0
    # As the library has read it, which a second reading of the file might differ from.
    left = [("decoder", json.loads(decoder.__getstate__()))] if decoder is not None else []
    while left:
        field, content = left.pop()
        num_parts += 1
        if num_parts > _MOST_PARTS:
            raise ModelFileError(path, f"decoder has more than {_MOST_PARTS} parts")
        for name in _REPLACED_BY_A_SPACE:
            if content.get(name) == "":
                raise ModelFileError(path, f"{field}.{name} is empty: a space would be put between all characters")
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
