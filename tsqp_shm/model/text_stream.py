"""Token ids into text as they come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsqp_shm.model.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A token that stands for one byte, as tokenizers' ByteFallback knows it.
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# Of what lies before, what a decoder is shown. What it does with a token depends on the one before it, and on whether
# it is the first, never on more.
_CONTEXT_TOKENS = 64


class TextStream:
    """Turns the token ids that follow a prompt into text as they come, in whole characters.

    The pieces and `finish` add up to what `Tokenizer.decode` of prompt and these ids has after its decoding of the
    prompt alone, the space before the first word included. A character that the prompt's last tokens began and these
    ids end belongs to the pieces: they are what the two decodings do not share.

    Only text that no later token can change is given out. So a run of byte tokens waits for its end: a decoder
    replaces all of it where one byte of it is bad.

    The `DecodeStream` of tokenizers is not used: it keeps what is left at the end to itself, so a reply that
    a token limit cuts inside a character would lose the replacement character that `decode` shows.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        # A window: the ids of the last piece, or the end of the prompt (a decoder may strip a space from the first
        # token that it sees, so no piece is decoded on its own), then those that are not out; and what is out of it.
        self._ids = self._context(prompt_token_ids)
        self._num_context = len(self._ids)
        self._num_bytes = self._length_of_run(self._ids)
        self._out = self._final()
        self._is_all_out = not self._ids
        # What the prompt shows beyond that may still become another character.
        self._of_prompt = self._decode()[len(self._out) :]
        self._undecided = ""

    def push(self, token_id: int) -> str:
        """Returns the text that is certain with this token, often "" inside of a character that spans tokens."""
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            self._num_bytes += 1
            self._is_all_out = False
            return ""
        self._num_bytes = 0
        text = self._decode()
        piece = self._emit(_without_open_end(text))
        self._is_all_out = self._out == text
        if piece and self._is_all_out:
            self._ids = self._ids[self._num_context :]
            self._num_context = len(self._ids)
            self._out = self._decode()
        elif len(self._ids) > 2 * _CONTEXT_TOKENS:
            # Hardly a whole character for so long.
            self._ids = self._ids[-_CONTEXT_TOKENS:]
            self._num_context = 0
            self._out = self._final()
        return self._beyond_prompt(piece)

    @property
    def pending(self) -> str:
        """What would follow if no token came any more."""
        rest = self._undecided + ("" if self._is_all_out else self._decode()[len(self._out) :])
        return rest[_shared(rest, self._of_prompt) :]

    def finish(self) -> str:
        """Returns `pending`; nothing may be pushed after it."""
        piece = self.pending
        self._ids, self._out, self._is_all_out, self._of_prompt, self._undecided = [], "", True, "", ""
        return piece

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        shown: list[int] = []
        for token_id in reversed(prompt_token_ids):
            token = self._tokenizer.token(token_id)
            if token is None or token_id in self._hidden:
                continue
            if len(shown) >= _CONTEXT_TOKENS and not _BYTE_TOKEN.fullmatch(token):
                # Not inside of a run of bytes.
                break
            shown.append(token_id)
        return shown[::-1]

    def _length_of_run(self, ids: Sequence[int]) -> int:
        for length, token_id in enumerate(reversed(ids)):
            if not _BYTE_TOKEN.fullmatch(self._tokenizer.token(token_id) or ""):
                return length
        return len(ids)

    def _final(self) -> str:
        """What of the window's text no later token can change."""
        return _without_open_end(self._decode(self._ids[: len(self._ids) - self._num_bytes]))

    def _emit(self, final: str) -> str:
        piece = final[len(self._out) :]
        self._out += piece
        return piece

    def _beyond_prompt(self, piece: str) -> str:
        if not self._of_prompt:
            return piece
        self._undecided += piece
        shared = _shared(self._undecided, self._of_prompt)
        if shared == len(self._undecided) < len(self._of_prompt):
            return ""
        piece, self._undecided, self._of_prompt = self._undecided[shared:], "", ""
        return piece

    def _decode(self, ids: Sequence[int] | None = None) -> str:
        # Special tokens that are to be skipped are not among them.
        return self._tokenizer.decode(self._ids if ids is None else ids, skip_special_tokens=False)


def _without_open_end(text: str) -> str:
    # At most three bytes can wait for the rest of a character; older replacements are final.
    return text[:-3] + text[-3:].rstrip(_REPLACEMENT)


def _shared(text: str, other: str) -> int:
    """The length of the beginning that two texts have in common."""
    for index, (one, another) in enumerate(zip(text, other, strict=False)):
        if one != another:
            return index
    return min(len(text), len(other))
