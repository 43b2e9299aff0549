"""The tokenizer that `LLM.get_tokenizer` gives: transformers' habits over ours, without transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tsqp_shm.conversations import as_conversations, render
from tsqp_shm.errors import ModelFileError, RequestError
from tsqp_shm.model.added_tokens import CONFIG_FILE, NAMED
from tsqp_shm.model.json_fields import brief
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.scalars import is_several, text, whole
from tsqp_shm.tokenizer_arguments import require_neutral

# What transformers takes where a tokenizer does not say.
_NO_LIMIT = int(1e30)
_INPUT_NAMES = ["input_ids", "attention_mask"]
_OWN = ("_tokenizer", "name_or_path", "model_input_names", "model_max_length")


class Encoded(dict[str, Any]):
    """What a tokenizer makes of texts: lists by name, which are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r}; there are {', '.join(self)}") from None


class TextTokenizer:
    """What is asked of it gives what transformers' `AutoTokenizer` for the same folder gives, as lists and strings;
    what there is not is one error. Texts are encoded in a process of its own, which ends with the LLM and is started
    again where this is used longer.

    Example:
        >>> tokenizer = llm.get_tokenizer()
        >>> ids = tokenizer.encode("Hello, world!")
        >>> tokenizer.decode(ids)
        'Hello, world!'
        >>> tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)
        ('<|im_end|>', 2, 49152)
    """

    is_fast = True

    def __init__(self, tokenizer: Tokenizer, name_or_path: str) -> None:
        """Raises:
        ModelFileError: a field of tokenizer_config.json that is asked for here is malformed.
        """
        self._tokenizer, self.name_or_path = tokenizer, name_or_path
        content, path = tokenizer.config.content, Path(name_or_path) / CONFIG_FILE
        names, limit = content.get("model_input_names", _INPUT_NAMES), content.get("model_max_length")
        # UNTRUSTED: whoever made the model says what he likes.
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelFileError(path, f"model_input_names is {brief(names)!r}, not a list of names")
        if limit is not None and type(limit) not in (int, float):
            raise ModelFileError(path, f"model_max_length is {brief(limit)!r}, not a number")
        self.model_input_names, self.model_max_length = list(names), limit or _NO_LIMIT

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _OWN:
            raise AttributeError(
                f"{name} of a session's tokenizer cannot be set: what follows from it is not done here"
            )
        super().__setattr__(name, value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session's tokenizer belongs to its process and cannot be copied or pickled")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name_or_path!r}, {len(self):,} tokens)"

    def __len__(self) -> int:
        """With the tokens that were added to the vocabulary."""
        return self._tokenizer.num_tokens(with_added=True)

    @property
    def vocab_size(self) -> int:
        """Without the tokens that were added to the vocabulary."""
        return self._tokenizer.num_tokens(with_added=False)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.vocabulary()

    @property
    def chat_template(self) -> str | None:
        return self._tokenizer.chat_template

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return self._tokenizer.config.special_tokens

    @property
    def extra_special_tokens(self) -> list[str]:
        return [str(getattr(token, "content", token)) for token in self._tokenizer.config.extra]

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int | None]:
        return [self._id(token) for token in self.all_special_tokens]

    def __getattr__(self, name: str) -> Any:
        """`eos_token`, `eos_token_id` and their like: None where the model has no such token."""
        if not name.startswith("_"):
            role = name.removesuffix("_id")
            token = self.special_tokens_map.get(role)
            if token is not None:
                return token if role == name else self._id(token)
            if role in NAMED:
                return None
        raise AttributeError(
            f"get_tokenizer() gives no transformers tokenizer, and what there is has no {name!r}; "
            "transformers.AutoTokenizer, in a process that may load it, has all"
        )

    def __call__(
        self,
        text: object,
        *,
        add_special_tokens: bool = True,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        **others: object,
    ) -> Encoded:
        """The ids of a text, or of each of several, and the masks that models ask for beside them.

        Raises:
            RequestError: it is no text, or none that the model's tokenizer can encode; or an argument asks for what is
                not done here.
        """
        require_neutral(others)
        return self._encoded(text, add_special_tokens, return_attention_mask, return_token_type_ids)

    def encode(self, text: object, *, add_special_tokens: bool = True, **others: object) -> list[Any]:
        """The ids of a text.

        Raises:
            RequestError: as of a call.
        """
        require_neutral(others)
        ids: list[Any] = self._encoded(text, add_special_tokens, None, None)["input_ids"]
        return ids

    def tokenize(self, text: object, *, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text, as they are found in it."""
        return self._tokenizer.tokens(_text(text), add_special_tokens)

    def decode(
        self, token_ids: object, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str | list[str]:
        """The text of ids, of one id, or the texts of several lists of ids.

        Raises:
            RequestError: they are no ids.
        """
        if clean_up_tokenization_spaces and not self._tokenizer.is_bpe:
            expected = "False: text is given as it is"
            raise RequestError("clean_up_tokenization_spaces", clean_up_tokenization_spaces, expected)
        listed = _plain(token_ids)
        if listed and isinstance(listed[0], list):
            return [self._decode(each, skip_special_tokens) for each in listed]
        return self._decode(listed, skip_special_tokens)

    def batch_decode(
        self, sequences: object, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """The texts of several lists of ids."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def convert_ids_to_tokens(self, ids: object, skip_special_tokens: bool = False) -> str | list[str | None] | None:
        token_id = whole(ids)
        if token_id is not None:
            return self._tokenizer.token(_checked(token_id, "ids"))
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        listed = [_checked(each, f"ids[{place}]") for place, each in enumerate(_plain(ids))]
        return [self._tokenizer.token(each) for each in listed if each not in skipped]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """The ids of tokens as the vocabulary spells them; what it does not have is the unknown token."""
        return self._id(tokens) if isinstance(tokens, str) else [self._id(token) for token in tokens]

    def apply_chat_template(
        self,
        conversation: object,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **others: object,
    ) -> Any:
        """The prompt by which a model is asked to answer a conversation, or each of several.

        Args:
            tokenize: False: as text, which is to be encoded without special tokens.
            return_dict: False: its ids alone.
            others: variables of the template.

        Raises:
            ConfigError: the model has no chat template.
            RequestError: the template refuses the messages, or an argument asks for what is not done here.

        Example:
            >>> tokenizer = llm.get_tokenizer()
            >>> messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
            >>> print(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            <|im_start|>system
            Be brief.<|im_end|>
            <|im_start|>user
            Hi!<|im_end|>
            <|im_start|>assistant
            <BLANKLINE>
        """
        variables = require_neutral(others, of_chat=True)
        listed = list(conversation) if is_several(conversation) else conversation
        if listed == []:
            raise RequestError("messages", listed, "at least one message")
        texts = [
            render(
                self._tokenizer,
                each,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )
            for each in as_conversations(listed)
        ]
        is_one = isinstance(listed, list) and any(isinstance(each, Mapping) for each in listed)
        rendered = texts[0] if is_one else texts
        if not tokenize:
            return rendered
        encoded = self._encoded(rendered, False, None, None)
        return encoded if return_dict else encoded["input_ids"]

    def _encoded(
        self, given: object, add_special_tokens: bool, with_mask: bool | None, with_types: bool | None
    ) -> Encoded:
        is_one = text(given) is not None
        if not is_one and not is_several(given):
            raise RequestError("text", given, "a string, or a list of strings", is_mistyped=True)
        texts = [_text(each) for each in (list(given) if is_several(given) else [given])]
        ids = [self._tokenizer.encode(each, add_special_tokens) for each in texts]
        found = {"input_ids": ids}
        for name, asked, filling in (("token_type_ids", with_types, 0), ("attention_mask", with_mask, 1)):
            if name in self.model_input_names if asked is None else asked:
                found[name] = [[filling] * len(each) for each in ids]
        return Encoded({name: lists[0] for name, lists in found.items()} if is_one else found)

    def _id(self, token: str) -> int | None:
        token_id = self._tokenizer.token_id(token)
        unknown = self.special_tokens_map.get("unk_token")
        return token_id if token_id is not None or unknown is None else self._tokenizer.token_id(unknown)

    def _decode(self, ids: list[Any], skip_special_tokens: bool) -> str:
        checked = [_checked(each, f"token_ids[{place}]") for place, each in enumerate(ids)]
        return self._tokenizer.decode(checked, skip_special_tokens=skip_special_tokens)


def _text(given: object) -> str:
    words = text(given)
    if words is None:
        raise RequestError("text", given, "a string", is_mistyped=True)
    return words


def _plain(given: object) -> list[Any]:
    """Ids, one or many, or lists of them, as Python's lists."""
    if isinstance(given, Mapping):
        given = given.get("input_ids")
    if whole(given) is not None:
        return [given]
    if hasattr(given, "tolist"):
        given = given.tolist()
    if not is_several(given):
        raise RequestError("token_ids", given, "token ids", is_mistyped=True)
    listed = [each if whole(each) is not None or not is_several(each) else _plain(each) for each in given]
    if len({isinstance(each, list) for each in listed}) > 1:
        raise RequestError("token_ids", given, "token ids, or lists of them")
    return listed


def _checked(value: object, name: str) -> int:
    token_id = whole(value)
    if token_id is None or not 0 <= token_id < 1 << 32:
        raise RequestError(name, value, "a token id", is_mistyped=token_id is None)
    return token_id
