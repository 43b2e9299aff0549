"""The weights of every norm, private to the TEE."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tsqp_shm.model.network import Network, Norm
from tsqp_shm.model.weights import Checkpoint


class NormWeights:
    """Shapes: of a norm [size] f32."""

    def __init__(self, weights: dict[str, npt.NDArray[np.float32]]) -> None:
        self._weights = weights

    @classmethod
    def load(cls, network: Network, checkpoint: Checkpoint) -> NormWeights:
        """Raises:
        ModelFileError: a tensor is missing or has another shape.
        """
        return cls({norm.weight: checkpoint.tensor(norm.weight, (norm.size,)).to_float32() for norm in network.norms})

    def __getitem__(self, norm: Norm) -> npt.NDArray[np.float32]:
        return self._weights[norm.weight]
