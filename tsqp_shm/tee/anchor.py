"""What holds a session to its model: the digest of what it has loaded, and the one that it was told to expect."""

from __future__ import annotations

from typing import Any

from tsqp_shm.errors import ModelFileError
from tsqp_shm.model.digest import Digests, ModelDigest
from tsqp_shm.model.files import ModelFiles


class Anchor:
    """Args:
        files: of the model, which the session reads through the same object.
        expected: the model digest that is pinned; None: the weights are taken as they are found.
        is_asked: whether somebody wants to know the digests all the same.

    Attributes:
        digests: of what the session has loaded; None where nobody asks, as hashing takes its time.
    """

    def __init__(self, files: ModelFiles, expected: str | None, *, is_asked: bool) -> None:
        self.digests: Digests | None = None
        self._files = files
        self._expected = expected
        self._is_asked = is_asked or expected is not None

    def begin(self) -> ModelDigest | None:
        """What takes everything that the mode loads, while it is at hand; None: nothing has to be hashed.

        Raises:
            ModelFileError: a file of the model cannot be read, or is another one than was read before.
        """
        return ModelDigest(self._files) if self._is_asked else None

    def hold(self, digest: ModelDigest | None) -> None:
        """Takes what was loaded, before anything is done with it.

        Raises:
            ModelFileError: it is not what is pinned.
        """
        if digest is None:
            return
        self.digests = digest.finish()
        if self._expected not in (None, self.digests.model):
            reason = f"the model's digest is {self.digests.model}, and {self._expected} is expected"
            raise ModelFileError(self._files.folder, reason)

    def describe(self) -> dict[str, Any]:
        digests = self.digests
        return {
            "is_pinned": self._expected is not None,
            "model_digest": None if digests is None else digests.model,
            "linears_digest": None if digests is None else digests.linears,
        }
