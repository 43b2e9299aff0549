"""Text to token ids and back, at once or token by token, as the tokenizer.json of a model folder says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from tsqp_shm.errors import ModelFileError, RequestError
from tsqp_shm.model.chat_template import ChatTemplate

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The tokenizer of a model folder.

    Source: transformers' `PreTrainedTokenizerFast`, without its optional clean-up of spaces.
    """

    def __init__(self, backend: tokenizers.Tokenizer, folder: Path) -> None:
        self._backend, self._folder = backend, folder
        # A tokenizer.json keeps the limits of whoever saved it last; a prompt is never cut or padded here.
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Loads tokenizer.json.

        Raises:
            ModelFileError: the file is missing or malformed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelFileError(path, "no such file; only models with a fast tokenizer are supported")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        # The library raises bare Exception for every malformed file.
        except Exception as error:
            raise ModelFileError(path, f"not a tokenizer: {error}") from error
        return cls(backend, folder)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids; `add_special_tokens=False` is for a prompt that a chat template made.

        Raises:
            RequestError: the text holds lone surrogates, which no tokenizer can represent.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError("text", ascii(text)[:80], "text that UTF-8 can encode") from error
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text; ids beyond the vocabulary (a padded embedding has some) give nothing."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        return TextStream(self, skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the prompt for a conversation; encode it with `add_special_tokens=False`.

        Raises:
            ConfigError: the model has no chat template.
            ModelFileError: its template is malformed.
            RequestError: the template refuses the messages.
        """
        return self._chat_template.render(messages, add_generation_prompt)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate.from_folder(self._folder)


class TextStream:
    """Turns token ids into text as they come, in whole characters.

    The pieces and `finish` add up to `Tokenizer.decode` of all the ids. (One exception: a tokenizer with byte
    fallback decodes a run of byte tokens as a whole; there a bad byte can change characters already out.)

    The `DecodeStream` of tokenizers is not used: it keeps what is left at the end to itself, so a reply that
    a token limit cuts inside a character would lose the replacement character that `decode` shows.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        # A window: the ids of the last piece (a decoder may strip a space from the first token it sees, so no
        # piece is decoded on its own), then those that are not out; and what of its text is out.
        self._ids: list[int] = []
        self._num_context = 0
        self._out = ""

    def push(self, token_id: int) -> str:
        """Returns the characters that this token completes, often "" inside of one that spans tokens."""
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith(_REPLACEMENT):
            # At most three bytes can wait for the rest of a character; older replacements are final. Not so
            # with byte fallback, which replaces a whole run of bytes, out or not, until all of it is valid.
            final = text[:-3] + text[-3:].rstrip(_REPLACEMENT)
            return self._emit(final) if final.startswith(self._out) else ""
        piece = self._emit(text)
        if piece:
            self._ids = self._ids[self._num_context :]
            self._num_context = len(self._ids)
            self._out = self._decode()
        return piece

    def finish(self) -> str:
        """Returns what is left (replacements for a character that stayed incomplete) and starts anew."""
        piece = self._emit(self._decode())
        self._ids, self._num_context, self._out = [], 0, ""
        return piece

    def _emit(self, text: str) -> str:
        piece = text[len(self._out) :]
        self._out += piece
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)
