"""The modes: what of a model crosses to the GPU process, and what that protects. A row each.

The mode is chosen once, by `--mode` or `LLM(mode=...)`, is part of the plan's digest, and is printed at every start.
"""

from __future__ import annotations

from dataclasses import dataclass

# Settings, as `config.EngineConfig` names them, of what a session without a GPU process does not have: the process and
# its device, a doorbell, and waits for the other side.
_OF_TWO_PROCESSES = frozenset(
    {
        "device", "pinning", "gpu_threads", "restart_gpu",
        "doorbell", "spin_us", "yield_us", "endpoint", "timeout_s",
    }
)  # fmt: skip
# Of attention whose tiles go to and fro, and of floating-point results that come from there.
_OF_SPLIT_ATTENTION = frozenset({"tile_rows", "tiles_in_flight", "float32_rows", "check_finite"})
# Of pads: how many are kept ready and by whom they are made, and where a product is computed that has none.
_OF_PADS = frozenset({"pad_stock", "pad_threads", "pad_ready", "pads_out", "prefill", "pad_prompt_to", "lock_memory"})
# Of modes that compute with weights in int8, whose digest this is.
_OF_INT8_WEIGHTS = frozenset({"model_digest"})


@dataclass(frozen=True)
class Mode:
    """Attributes:
    protects: one honest line of what it protects and what not, printed at every start.
    summary: the same in a few words, where another mode's start names it.
    arithmetic: what products and cache are computed in; None: as the setting `dtype` says.
    has_gpu_process: whether there is one; without it there is no arena, no doorbell and no torch either.
    num_vectors: secret ones by which each row of each product of the GPU process is checked; 0: none is.
    has_pads: whether what crosses is blinded by one-time pads.
    splits_attention: whether the caches of keys and values lie with the GPU process, and tiles of scores cross.
    """

    name: str
    protects: str
    summary: str
    arithmetic: str | None = None
    has_gpu_process: bool = True
    splits_attention: bool = False
    num_vectors: int = 0
    has_pads: bool = False

    @property
    def line(self) -> str:
        return f"mode {self.name}: {self.protects}"

    def refusal(self, setting: str) -> str | None:
        """Why this mode does not take a setting of `config.EngineConfig`; None: it does."""
        if not self.has_gpu_process and setting in _OF_TWO_PROCESSES | _OF_SPLIT_ATTENTION:
            return f"none, as mode {self.name} has no GPU process"
        if not self.splits_attention and setting in _OF_SPLIT_ATTENTION:
            return f"none, as mode {self.name} keeps attention in the TEE process"
        if not self.has_pads and setting in _OF_PADS:
            return f"none, as mode {self.name} has no pads"
        if self.arithmetic is not None and setting == "dtype":
            return f"none, as mode {self.name} computes in {self.arithmetic}"
        if self.arithmetic is None and setting in _OF_INT8_WEIGHTS:
            # It could be checked at the price of a second loading, and would say nothing of bits that int8 rounds away.
            return f"none, as mode {self.name} computes with weights as they are stored, and a digest is of int8 ones"
        return None


MODES = {
    mode.name: mode
    for mode in (
        Mode(
            "plain",
            "activations cross in clear. It protects nothing from whoever controls the GPU process: hidden states can "
            "be inverted to the prompt.",
            "split with a GPU process, which sees all activations",
            splits_attention=True,
        ),
        Mode(
            "verified",
            "every product of the GPU process is checked, and no token comes out of a pass with one that is false. It "
            "hides nothing: activations cross in clear, and can be inverted to the prompt.",
            "a GPU process multiplies and is checked; it sees all activations",
            arithmetic="w8, cache bf16",
            num_vectors=2,
        ),
        Mode(
            "blinded",
            "every product of the GPU process is checked, and what crosses is blinded with one-time pads: lengths, "
            "batches and times can be seen there, prompt, answer and activations cannot. It protects nothing from "
            "whoever controls the TEE process, or its machine where that is no enclave.",
            "a GPU process multiplies and is checked; it sees lengths and uniform words",
            arithmetic="w8, cache bf16",
            num_vectors=2,
            has_pads=True,
        ),
        Mode(
            "tee-only",
            "no activation leaves the TEE process: there is no GPU process, and nothing crosses. It protects nothing "
            "from whoever controls the TEE process, or its machine where that is no enclave.",
            "the whole model in the TEE process, without a GPU process",
            arithmetic="w8, cache bf16",
            has_gpu_process=False,
        ),
    )
}
