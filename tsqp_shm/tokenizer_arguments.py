"""Arguments of transformers' tokenizers that ask for what is not done here: what each may be all the same."""

from __future__ import annotations

from collections.abc import Mapping

from tsqp_shm.errors import RequestError

_LISTS = "None, as lists are given: torch.tensor([ids]) or numpy.array([ids]) makes another thing of one"
_WHOLE = "as nothing is cut or filled up here: a list can be"
_IDS = "False, as ids and masks are all that is given"
_OF_BOTH: dict[str, tuple[tuple[object, ...], str]] = {
    "padding": ((False, None, "do_not_pad"), f"False, {_WHOLE}"),
    "truncation": ((False, None, "do_not_truncate"), f"False, {_WHOLE}"),
    "max_length": ((None,), f"None, {_WHOLE}"),
    "return_tensors": ((None,), _LISTS),
    "sanitize_control_tokens": ((False,), "False, as texts are encoded as they are"),
}
_OF_TEXT: dict[str, tuple[tuple[object, ...], str]] = {
    **_OF_BOTH,
    "stride": ((0,), f"0, {_WHOLE}"),
    "pad_to_multiple_of": ((None,), f"None, {_WHOLE}"),
    "padding_side": ((None,), f"None, {_WHOLE}"),
    "text_pair": ((None,), "None, as texts are encoded one by one"),
    "is_split_into_words": ((False,), "False, as texts are encoded as they are"),
    "return_overflowing_tokens": ((False,), _IDS),
    "return_special_tokens_mask": ((False,), _IDS),
    "return_offsets_mapping": ((False,), _IDS),
    "return_length": ((False,), _IDS),
    "verbose": ((True, False), "True or False"),
}
_OF_CHAT: dict[str, tuple[tuple[object, ...], str]] = {
    **_OF_BOTH,
    "tools": ((None,), "None, as a template gets no tools here"),
    "documents": ((None,), "None, as a template gets no documents here"),
    "chat_template": ((None,), "None, as the model's own is rendered"),
    "return_assistant_tokens_mask": ((False,), _IDS),
    "tokenizer_kwargs": ((None,), "None"),
}


def require_neutral(given: Mapping[str, object], *, of_chat: bool = False) -> dict[str, object]:
    """Args:
        of_chat: whether they are those of `apply_chat_template`, and not of a text.

    Returns:
        Those of a chat that are none of transformers', and so variables of a template.

    Raises:
        RequestError: one asks for what is not done here, or is none of a text.
    """
    known, variables = _OF_CHAT if of_chat else _OF_TEXT, {}
    for name, value in given.items():
        if name not in known:
            if not of_chat:
                raise RequestError(name, value, "no such argument: transformers has none either, or it is not here")
            variables[name] = value
            continue
        neutral, expected = known[name]
        if not any(value is each or (type(value) is type(each) and value == each) for each in neutral):
            raise RequestError(name, value, expected)
    return variables
