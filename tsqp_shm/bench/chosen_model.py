"""What a benchmark measures with: a folder, the demo model, or random weights of a known shape."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tsqp_shm.bench.scratch import scratch_folder
from tsqp_shm.bench.shapes import shape_config, write_shape
from tsqp_shm.errors import ConfigError


@dataclass(frozen=True)
class ChosenModel:
    """As it was asked for; None: it was not.

    Attributes:
        layers: only so many of the shape.
    """

    folder: str | None = None
    shape: str | None = None
    layers: int | None = None

    def require_sane(self) -> None:
        """Raises:
        ConfigError: these do not go together, or there is no such shape.
        """
        if self.shape is not None:
            if self.folder is not None:
                raise ConfigError("shape", self.shape, "either MODEL or --shape")
            shape_config(self.shape, self.layers)
        elif self.layers is not None:
            raise ConfigError("layers", self.layers, "a --shape to take layers of")

    def open(self, stack: ExitStack, demo_model: Callable[[], Path]) -> tuple[Path, str]:
        """The folder, random weights until the stack ends, and what to call it."""
        if self.shape is None:
            # A contender may have another working folder.
            folder = (demo_model() if self.folder is None else Path(self.folder)).absolute()
            return folder, folder.name
        config = shape_config(self.shape, self.layers)
        scratch = stack.enter_context(scratch_folder())
        write_shape(scratch, config)
        return scratch.absolute(), f"random {self.shape}, {config['num_hidden_layers']} layers"
