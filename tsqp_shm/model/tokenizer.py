"""Text to token ids and back, at once or token by token, as the tokenizer.json of a model folder says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from tsqp_shm.errors import ModelFileError, RequestError
from tsqp_shm.model.chat_template import ChatTemplate
from tsqp_shm.model.text_stream import TextStream


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

    def stream(self, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> TextStream:
        return TextStream(self, prompt_token_ids, skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """Returns a token as the vocabulary spells it; None beyond the vocabulary."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

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
