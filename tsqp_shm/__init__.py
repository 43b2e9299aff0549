"""Split LLM inference: a trusted process and an untrusted GPU process over one shared-memory arena.

`LLM` and `SamplingParams` are the Python API; they are loaded when first used, so that a role process imports only
what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsqp_shm._version import __version__

if TYPE_CHECKING:
    from tsqp_shm.llm import LLM, CompletionOutput, Conversation, Logprob, RequestMetrics, RequestOutput
    from tsqp_shm.tee.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Conversation",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tsqp_shm import llm

    return getattr(llm, name)
