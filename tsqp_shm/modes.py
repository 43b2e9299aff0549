"""The modes: what of a model crosses to the GPU process, and what that protects. A row each.

The mode is chosen once, by `--mode` or `LLM(mode=...)`, is part of the plan's digest, and is printed at every start.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """Attributes:
    protects: one honest line of what it protects and what not, printed at every start.
    """

    name: str
    protects: str

    @property
    def line(self) -> str:
        return f"mode {self.name}: {self.protects}"


MODES = {
    mode.name: mode
    for mode in (
        Mode(
            "plain",
            "activations cross in clear. It protects nothing from whoever controls the GPU process: hidden states can "
            "be inverted to the prompt.",
        ),
    )
}
