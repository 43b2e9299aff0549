"""Tokenizers of every kind of decoder, small enough to be made in a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tsqp_shm.model.tokenizer import Tokenizer

# What a checkpoint of the ChatML kind has; the first is its end-of-sequence token.
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCEPIECE_WORDS = ("▁Hello", "▁world", "▁", "▁▁", "!", "é", "▁🙂", "x", "\N{REPLACEMENT CHARACTER}")


def _with_specials(backend: tokenizers.Tokenizer, specials: Sequence[str]) -> tokenizers.Tokenizer:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return backend


def byte_level(words: Sequence[str] = (), specials: Sequence[str] = CHAT_TOKENS) -> tokenizers.Tokenizer:
    """A token for each byte, then words as the vocabulary spells them, then special tokens."""
    vocabulary = {token: index for index, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_specials(backend, specials)


def sentencepiece(words: Sequence[str] = SENTENCEPIECE_WORDS) -> tokenizers.Tokenizer:
    """As Llama 2 has it: underlined spaces, byte tokens for unknown characters, a first space that is no text."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(vocabulary)},
            [],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_specials(backend, ["<unk>", "<s>", "</s>"])


def words(
    vocabulary: Sequence[str], decoder: object, specials: Sequence[str] = ("<s>", "</s>")
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=vocabulary[0])
    )
    if decoder is not None:
        backend.decoder = decoder
    return _with_specials(backend, specials)


def every_kind() -> dict[str, tokenizers.Tokenizer]:
    """By its decoder."""
    underlined = ("▁", "▁▁", "▁a", "b", "▁▁c", "d▁", "é")
    return {
        "ByteLevel": byte_level(("Ġhello", "Ãī", "ðŁ", "Ġ")),
        "ByteFallback": sentencepiece(),
        "Metaspace, always": words(underlined, decoders.Metaspace(prepend_scheme="always")),
        "Metaspace, never": words(underlined, decoders.Metaspace(prepend_scheme="never")),
        "WordPiece": words(("a", "##b", "##cd", "don", "'", "n't", ".", ",", "##"), decoders.WordPiece(), ["[SEP]"]),
        "BPEDecoder": words(("a", "b</w>", "c", "d</w>", "</w>"), decoders.BPEDecoder()),
        "CTC": words(("<pad>", "|", "a", "b"), decoders.CTC()),
        "none": words(("a", "b", " c", "d "), None),
    }


def tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, Path("nowhere"))
