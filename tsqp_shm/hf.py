"""A split model where code expects a transformers one: torch tensors in, torch tensors out.

For evaluation and comparison. It loads torch and transformers into the process that plays the TEE role, which an
enclave would not do; `tsqp_shm.LLM` is the front that does not. Needs `pip install '.[hf]'`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from tsqp_shm.errors import ConfigError, RequestError
from tsqp_shm.llm import LLM


class SplitForCausalLM:
    """Answers `model(input_ids).logits` and `model.generate(input_ids)` as an `AutoModelForCausalLM` does.

    Args:
        model, config: as for `LLM`.
    """

    def __init__(self, model: str | bytes | os.PathLike[str] | None = None, **config: Any) -> None:
        self.llm = LLM(model, **config)

    @classmethod
    def from_pretrained(cls, model: str | bytes | os.PathLike[str] | None = None, **config: Any) -> SplitForCausalLM:
        return cls(model, **config)

    def __enter__(self) -> SplitForCausalLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session."""
        self.llm.close()

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CausalLMOutput:
        """Shapes: input_ids [B, T]; logits [B, T, V] f32.

        Args:
            attention_mask: all ones; a padded batch has no place in a ragged one.

        Raises:
            RequestError: as `LLM.logits`, or the shapes are others.
        """
        rows = [torch.from_numpy(self.llm.logits(row)) for row in _rows(input_ids, attention_mask)]
        return CausalLMOutput(logits=torch.stack(rows))

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 64,
        **sampling: Any,
    ) -> torch.Tensor:
        """Completes each row, together as one batch; rows that end early are filled with the end-of-sequence token.

        Shapes: input_ids [B, T]; result [B, T + longest completion].

        Args:
            attention_mask: all ones, as above.
            sampling: fields of `SamplingParams`, over what the model's generation_config.json says.

        Raises:
            ConfigError: as `SamplingParams`.
            RequestError: as `LLM.generate`, or the shapes are others.
        """
        params = replace(self.llm.get_default_sampling_params(), max_tokens=max_new_tokens, **sampling)
        if params.n != 1:
            raise ConfigError("n", params.n, "1, as each row is completed once; LLM.generate gives several")
        outputs = self.llm.generate(_rows(input_ids, attention_mask), params, use_tqdm=False)
        completions = [output.outputs[0].token_ids for output in outputs]
        longest = max(len(completion) for completion in completions)
        fill = self.llm.spec.eos_token_ids[0] if self.llm.spec.eos_token_ids else 0
        padded = [completion + [fill] * (longest - len(completion)) for completion in completions]
        return torch.cat([input_ids, torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _rows(input_ids: object, attention_mask: object) -> list[list[int]]:
    expected = "a tensor of token ids [B, T], not empty"
    if not isinstance(input_ids, torch.Tensor):
        raise RequestError("input_ids", input_ids, expected, is_mistyped=True)
    if input_ids.dim() != 2 or not input_ids.numel():
        raise RequestError("input_ids", f"one of shape {list(input_ids.shape)}", expected)
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor):
            raise RequestError("attention_mask", attention_mask, "a tensor of ones", is_mistyped=True)
        if attention_mask.shape != input_ids.shape or not attention_mask.all():
            raise RequestError(
                "attention_mask", "one that hides tokens", "ones; rows of several lengths are for LLM.generate"
            )
    rows: list[list[int]] = input_ids.tolist()
    return rows
