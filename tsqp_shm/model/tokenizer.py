"""Text to token ids and back, at once or token by token, as the tokenizer files of a model folder say."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from tsqp_shm.errors import ConfigError, ModelFileError, RequestError
from tsqp_shm.model.added_tokens import TokenizerConfig
from tsqp_shm.model.chat_template import ChatTemplate
from tsqp_shm.model.confined import DEADLINE_S, ConfinedError, ConfinedProcess, NoProcessError
from tsqp_shm.model.decoder import require_bounded
from tsqp_shm.model.files import MAX_TOKENIZER_BYTES, ModelFiles
from tsqp_shm.model.text_stream import TextStream
from tsqp_shm.model.tokenizer_class import TokenizerClass
from tsqp_shm.printable import quoted

TOKENIZER_FILE = "tokenizer.json"
# Of the files of older tokenizers.
HOW_TO_MAKE_ONE = "transformers makes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
# To read a tokenizer.json: the largest real ones take some seconds.
_READING_DEADLINE_S = 30.0
# A tokenizer encodes a multiple of that in a second.
_CHARACTERS_PER_SECOND = 10_000
_MOST_ENCODING_S = 30.0
# A text up to this is encoded in any case, as it takes no time.
_SHORT_BYTES = 1 << 16


class _Part(NamedTuple):
    """What is wanted of an encoded text: the request for it, in small letters without special tokens."""

    request: bytes
    attribute: str
    type: type


_IDS, _TOKENS = _Part(b"E", "ids", int), _Part(b"W", "tokens", str)


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, and the tokens that are named beside it.

    It is read first, and texts are encoded, in a process of its own (`model/confined.py`): a malformed file can end the
    process that reads it, and an expression in it may backtrack for ever. Tokens become text here, because that is done
    for each one. Where the system starts no process, all of it is done here, unbounded, and a warning says so.

    Attributes:
        config: what the folder says beside tokenizer.json.

    Source: transformers' `TokenizersBackend`. Its classes that put a normalizer and a pre-tokenizer of their own in the
        place of the file's are followed as far as `model/tokenizer_class.py` says.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        folder: Path | ModelFiles,
        config: TokenizerConfig | None = None,
        process: ConfinedProcess | None = None,
    ) -> None:
        """Args:
        config: what the folder says beside tokenizer.json; the backend has been told.
        process: one that has been given the same tokenizer; None: texts are encoded here.
        """
        self._backend, self._files = backend, ModelFiles.of(folder)
        self.config, self._process = config or TokenizerConfig(), process
        # A tokenizer.json keeps the limits of whoever saved it last; a prompt is never cut or padded here.
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def from_folder(cls, folder: Path | ModelFiles) -> Tokenizer:
        """Loads tokenizer.json, tokenizer_config.json, special_tokens_map.json and added_tokens.json.

        Raises:
            ModelFileError: a file is missing or malformed.
            UnsupportedModel: a field asks for what is not done here.
        """
        files = ModelFiles.of(folder)
        path = files.path(TOKENIZER_FILE)
        if not files.has(TOKENIZER_FILE):
            raise ModelFileError(path, f"no such file; {HOW_TO_MAKE_ONE}")
        content = files.read(TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
        with contextlib.ExitStack() as stack:
            confined = ConfinedProcess(len(content))
            stack.callback(confined.close)
            process: ConfinedProcess | None = confined
            with _of_file(path):
                end = time.monotonic() + _READING_DEADLINE_S
                try:
                    confined.prepare(b"T", content, _READING_DEADLINE_S)
                except NoProcessError as error:
                    process = None
                    _warn_of_no_process(error)
                backend = tokenizers.Tokenizer.from_buffer(content)
            require_bounded(backend.decoder, path)
            config = TokenizerConfig.from_folder(files, backend)
            kind = TokenizerClass.from_folder(files, config, content)
            followed, config = kind.rebuilt(content, backend), kind.with_defaults()
            if followed != content:
                with _of_file(path):
                    if process is not None:
                        process.prepare(b"T", followed, _READING_DEADLINE_S)
                    backend = tokenizers.Tokenizer.from_buffer(followed)
            with _of_file(path):
                if process is not None:
                    trial = [config.tokens_to_add(backend), config.splits_special_tokens]
                    process.prepare(b"A", json.dumps(trial).encode(), end - time.monotonic())
                config.add_to(backend)
            stack.pop_all()
        return cls(backend, files, config, process)

    def encode(self, text: str, add_special_tokens: bool = True, most_tokens: int | None = None) -> list[int]:
        """Returns the token ids.

        Args:
            add_special_tokens: False is for a prompt that a chat template made.
            most_tokens: a text that is longer than so many of the longest tokens is not encoded.

        Raises:
            RequestError: the text holds lone surrogates, which no tokenizer can represent, or is too long; or the
                tokenizer fails on it or takes too long, or others keep it for too long.
        """
        ids: list[int] = self._encoded(text, _IDS, add_special_tokens, most_tokens)
        return ids

    def tokens(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Returns the tokens as they are found in the text.

        Raises:
            RequestError: as `encode`.
        """
        tokens: list[str] = self._encoded(text, _TOKENS, add_special_tokens, None)
        return tokens

    def _encoded(self, text: str, part: _Part, add_special_tokens: bool, most_tokens: int | None) -> list[Any]:
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            raise RequestError("text", _length(text), "text that UTF-8 can encode") from error
        if most_tokens is not None and len(content) > _SHORT_BYTES:
            longest = self._longest_token_bytes
            if len(content) > most_tokens * longest:
                expected = f"at most {most_tokens} tokens, none of which has more than {longest} bytes"
                raise RequestError("text", _length(text), expected)
        try:
            if self._process is None:
                found: list[Any] = getattr(
                    self._backend.encode(text, add_special_tokens=add_special_tokens), part.attribute
                )
                return found
            deadline_s = min(DEADLINE_S + len(text) / _CHARACTERS_PER_SECOND, _MOST_ENCODING_S)
            request = part.request if add_special_tokens else part.request.lower()
            return _listed(self._process.ask(request, content, deadline_s), part.type)
        except NoProcessError as error:
            self._process = None
            _warn_of_no_process(error)
            return self._encoded(text, part, add_special_tokens, most_tokens)
        except BaseException as error:
            expected = f"text that the model's tokenizer can encode: {_library_error(error)}"
            raise RequestError("text", _length(text), expected) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text; ids beyond the vocabulary (a padded embedding has some) give nothing.

        Raises:
            ModelFileError: the tokenizer fails on them.
        """
        try:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            reason = f"the tokenizer cannot decode: {_library_error(error)}"
            raise ModelFileError(self._files.path(TOKENIZER_FILE), reason) from error
        return text

    def stream(self, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> TextStream:
        return TextStream(self, prompt_token_ids, skip_special_tokens)

    @property
    def is_bpe(self) -> bool:
        return isinstance(self._backend.model, tokenizers.models.BPE)

    def vocabulary(self) -> dict[str, int]:
        """All tokens as the vocabulary spells them, the added ones included, with their ids."""
        vocabulary: dict[str, int] = self._backend.get_vocab()
        return vocabulary

    def num_tokens(self, *, with_added: bool) -> int:
        number: int = self._backend.get_vocab_size(with_added_tokens=with_added)
        return number

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token as the vocabulary spells it; None where there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def token(self, token_id: int) -> str | None:
        """Returns a token as the vocabulary spells it; None beyond the vocabulary."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def spelled(self, token_id: int) -> str:
        """Returns the text of one token alone, special ones included; half a character is a replacement character."""
        return self.decode([token_id], skip_special_tokens=False)

    @cached_property
    def _longest_token_bytes(self) -> int:
        """As the vocabulary spells it, which is in no fewer bytes than its text has."""
        return max((len(token.encode()) for token in self._backend.get_vocab()), default=0)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Returns the prompt for a conversation; encode it with `add_special_tokens=False`.

        Args:
            variables: more of them for the template.

        Raises:
            ConfigError: the model has no chat template.
            ModelFileError: its template is malformed.
            RequestError: the template refuses the messages.
            LimitError: the system starts no process, which a template needs.
        """
        return self._chat_template.render(messages, add_generation_prompt, variables or {})

    @property
    def chat_template(self) -> str | None:
        """Its source; None where the model has none.

        Raises:
            ModelFileError, LimitError: as `apply_chat_template`.
        """
        try:
            return self._chat_template.source
        except ConfigError:
            return None

    def close(self) -> None:
        """Ends the process of its own; it is started again where it is needed again."""
        if self._process is not None:
            self._process.close()

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate.from_folder(self._files, self.config, self._process or ConfinedProcess())


@contextlib.contextmanager
def _of_file(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        raise ModelFileError(path, f"not a tokenizer: {_library_error(error)}") from error


def _warn_of_no_process(error: NoProcessError) -> None:
    reason = f"{error}; texts are encoded in this one, where nothing bounds what the model's tokenizer takes"
    warnings.warn(reason, RuntimeWarning, stacklevel=3)


def _length(text: str) -> str:
    """What an error says of a text: what is in it is none of a log's business."""
    return f"{len(text):,} characters"


def _listed(answer: bytes, item: type) -> list[Any]:
    """UNTRUSTED: an answer of the confined process; that ids are of the vocabulary is looked at with each request."""
    try:
        listed = json.loads(answer)
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list) or not all(type(each) is item for each in listed):
        raise ConfinedError("the confined process does not answer in form")
    return listed


def _library_error(error: BaseException) -> str:
    """What the library says of a text or a file; anything else is raised again."""
    if isinstance(error, ConfinedError):
        return str(error)
    # It raises bare Exception for whatever it refuses, and a panic of it is no Exception.
    if type(error) is not Exception and type(error).__name__ != "PanicException":
        raise error
    return quoted(error)
