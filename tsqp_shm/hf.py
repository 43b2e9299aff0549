"""A split model where code expects a transformers one: torch tensors in, torch tensors out.

For evaluation and comparison. It loads torch and transformers into the process that plays the TEE role, which an
enclave would not do; `tsqp_shm.LLM` is the front that does not. Needs `pip install '.[hf]'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from tsqp_shm.llm import LLM
from tsqp_shm.tee.sampler import SamplingParams


class SplitForCausalLM:
    """Answers `model(input_ids).logits` and `model.generate(input_ids)` as an `AutoModelForCausalLM` does.

    Args:
        model: a Hugging Face folder.
        config: as for `LLM`.
    """

    def __init__(self, model: str | Path, **config: Any) -> None:
        self.llm = LLM(model, **config)

    @classmethod
    def from_pretrained(cls, model: str | Path, **config: Any) -> SplitForCausalLM:
        return cls(model, **config)

    def __enter__(self) -> SplitForCausalLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the GPU process and removes the arena."""
        self.llm.close()

    def __call__(self, input_ids: torch.Tensor) -> CausalLMOutput:
        """Shapes: input_ids [B, T]; logits [B, T, V] f32.

        Raises:
            RequestError: as `LLM.logits`.
        """
        rows = [torch.from_numpy(self.llm.logits(row)) for row in input_ids.tolist()]
        return CausalLMOutput(logits=torch.stack(rows))

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int = 64, **sampling: Any) -> torch.Tensor:
        """Completes each row, together as one batch; rows that end early are filled with the end-of-sequence token.

        Shapes: input_ids [B, T]; result [B, T + longest completion].

        Args:
            sampling: fields of `SamplingParams`.

        Raises:
            RequestError: as `LLM.generate`.
        """
        params = SamplingParams(max_tokens=max_new_tokens, **sampling)
        outputs = self.llm.generate(input_ids.tolist(), params)
        completions = [output.outputs[0].token_ids for output in outputs]
        longest = max(len(completion) for completion in completions)
        fill = self.llm.spec.eos_token_ids[0] if self.llm.spec.eos_token_ids else 0
        padded = [completion + [fill] * (longest - len(completion)) for completion in completions]
        return torch.cat([input_ids, torch.tensor(padded, dtype=input_ids.dtype)], dim=1)
