"""The demo model's tokenizer, ours and that of transformers: loaded once, when the first test needs them.

Whoever uses `ours` asks for the fixture `demo_tokenizers`, which ends its process.
"""

from __future__ import annotations

import functools
from typing import Any

from tsqp_shm.demo.model import demo_model_folder
from tsqp_shm.model.tokenizer import Tokenizer


@functools.cache
def ours() -> Tokenizer:
    return Tokenizer.from_folder(demo_model_folder())


@functools.cache
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_folder())
