"""The weights of every norm, private to the TEE."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tsqp_shm.model.digest import ModelDigest
from tsqp_shm.model.field_weights import require_finite
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
        UnsupportedModel: a weight is no finite number.
        """
        tensors = [require_finite(checkpoint.tensor(norm.weight, (norm.size,))) for norm in network.norms]
        # Copies, always: whoever may write the model's file would change a view of it while the session runs, and end
        # this process by truncating it.
        return cls({tensor.name: np.array(tensor.to_float32(), np.float32, copy=True) for tensor in tensors})

    def add_to(self, digest: ModelDigest, network: Network) -> None:
        for norm in network.norms:
            digest.add_norm(norm, self[norm])

    def __getitem__(self, norm: Norm) -> npt.NDArray[np.float32]:
        return self._weights[norm.weight]
