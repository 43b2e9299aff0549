"""The text of a completion, as it may be given out."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.tee.sampling_params import SamplingParams


class Answer:
    """Turns tokens into text until a stop string ends it.

    Two texts are made of the tokens. The one that is given out has no special tokens; stop strings are looked for in
    the one that spells them out. Of the first is held back what in the second may be the beginning of a stop string.

    Args:
        prompt_token_ids: after which the tokens come: a decoder strips a space from the first token there is.

    Attributes:
        stopped_by: the stop string that was found; nothing may be pushed after it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.stopped_by: str | None = None
        self._stops = stops = params.stop_strings
        self._shows_stop = params.include_stop_str_in_output
        skips = params.skip_special_tokens
        self._hidden = tokenizer.special_token_ids if skips else frozenset()
        self._shown = tokenizer.stream(prompt_token_ids, skip_special_tokens=skips)
        self._spelled = tokenizer.stream(prompt_token_ids, skip_special_tokens=False) if stops else None
        # What is held back, in both texts, and the lengths of both that belong together, token by token.
        self._held = self._held_spelled = ""
        self._marks: list[tuple[int, int]] = []
        # Before this place of the spelled-out text no stop string counts.
        self._counts_from = 0
        self._may_stop = True

    def push(self, token_id: int, *, is_shown: bool = True, may_stop: bool = True) -> str:
        """Takes a token. Returns what can be given out with it.

        Args:
            is_shown: False for a token that the text leaves out, an end-of-sequence token say.
            may_stop: whether stop strings count that end in its text.
        """
        self._may_stop = may_stop
        if not is_shown or token_id in self._hidden:
            return self._push_hidden(token_id)
        piece = self._shown.push(token_id)
        if self._spelled is None:
            return piece
        spelled = self._spelled.push(token_id)
        self._held += piece
        self._held_spelled += spelled
        if piece != spelled and spelled.startswith(piece):
            # The first word of all may have lost the space behind it.
            self._marks.append((len(self._held_spelled) - len(spelled) + len(piece), len(self._held)))
        self._marks.append((len(self._held_spelled), len(self._held)))
        return self._give()

    def _push_hidden(self, token_id: int) -> str:
        if self._spelled is None:
            return ""
        place = len(self._held) + len(self._shown.pending)
        self._marks.append((len(self._held_spelled) + len(self._spelled.pending), place))
        self._held_spelled += self._spelled.push(token_id)
        self._marks.append((len(self._held_spelled), place))
        return self._give()

    def finish(self) -> str:
        """Returns what is left, if no stop string has ended it before or does now."""
        if self.stopped_by is not None:
            return ""
        self._held += self._shown.finish()
        given = ""
        if self._spelled is not None:
            self._held_spelled += self._spelled.finish()
            self._marks.append((len(self._held_spelled), len(self._held)))
            given = self._give()
        rest, self._held = self._held, ""
        return given + rest

    def _give(self) -> str:
        assert self._spelled is not None
        tentative = self._spelled.pending
        # A character that is not whole yet is no replacement character.
        looked_at = self._held_spelled + ("" if "\N{REPLACEMENT CHARACTER}" in tentative else tentative)
        if not self._may_stop:
            self._counts_from = len(looked_at)
        # A token may complete several: the first in the text ends it, not the first in the list.
        ends = [
            (at, stop)
            for stop in self._stops
            if (at := looked_at.find(stop, max(0, self._counts_from - len(stop) + 1))) >= 0
        ]
        found = min(ends, key=itemgetter(0), default=None)
        if found is not None:
            end, self.stopped_by = found
            self._held += self._shown.finish()
            self._marks.append((len(looked_at), len(self._held)))
            given, self._held = self._held[: self._place(end)], ""
            return given + (self.stopped_by if self._shows_stop else "")
        end = len(self._held_spelled) - _longest_overlap(self._held_spelled, self._stops)
        place = self._place(end)
        given, self._held = self._held[:place], self._held[place:]
        self._held_spelled = self._held_spelled[end:]
        self._counts_from = max(0, self._counts_from - end)
        # What is not certain yet of the shown text stays before the place.
        marks = [(end, place), *(mark for mark in self._marks if mark[0] > end)]
        self._marks = [(spelled - end, shown - len(given)) for spelled, shown in marks]
        return given

    def _place(self, at: int) -> int:
        """Where a place of the spelled-out text lies in the other one."""
        reached = 0
        for spelled, shown in self._marks:
            if spelled > at:
                # Inside of a token both texts end alike; where the token is left out, it has no place at all.
                return max(reached, shown - (spelled - at))
            reached = shown
        return reached


def _longest_overlap(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters could be the beginning of a stop string."""
    for length in range(min(len(text), max((len(stop) - 1 for stop in stops), default=0)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
