"""The modes: what of a model crosses to the GPU process, and what that protects. A row each.

The mode is chosen once, by `--mode` or `LLM(mode=...)`, is part of the plan's digest, and is printed at every start.
"""

from __future__ import annotations

from dataclasses import dataclass

# Settings, as `config.EngineConfig` names them, of what a session without a GPU process does not have: the process and
# its device, tiles of attention that go to and fro, a doorbell, waits for the other side, and what comes back from it.
_OF_TWO_PROCESSES = frozenset(
    {
        "device", "pinning", "gpu_threads", "restart_gpu", "tile_rows", "tiles_in_flight",
        "doorbell", "spin_us", "yield_us", "endpoint", "timeout_s", "check_finite",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """Attributes:
    protects: one honest line of what it protects and what not, printed at every start.
    summary: the same in a few words, where another mode's start names it.
    arithmetic: what products and cache are computed in; None: as the setting `dtype` says.
    has_gpu_process: whether there is one; without it there is no arena, no doorbell and no torch either.
    """

    name: str
    protects: str
    summary: str
    arithmetic: str | None = None
    has_gpu_process: bool = True

    @property
    def line(self) -> str:
        return f"mode {self.name}: {self.protects}"

    def refusal(self, setting: str) -> str | None:
        """Why this mode does not take a setting of `config.EngineConfig`; None: it does."""
        if not self.has_gpu_process and setting in _OF_TWO_PROCESSES:
            return f"none, as mode {self.name} has no GPU process"
        if self.arithmetic is not None and setting == "dtype":
            return f"none, as mode {self.name} computes in {self.arithmetic}"
        return None


MODES = {
    mode.name: mode
    for mode in (
        Mode(
            "plain",
            "activations cross in clear. It protects nothing from whoever controls the GPU process: hidden states can "
            "be inverted to the prompt.",
            "split with a GPU process, which sees all activations",
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
