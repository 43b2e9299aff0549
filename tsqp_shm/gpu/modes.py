"""What makes the GPU process's operations of each mode that has one. Names are those of `tsqp_shm.modes`."""

from __future__ import annotations

from tsqp_shm.gpu import field_products, plain
from tsqp_shm.gpu.loading import ModeLoader

LOADERS: dict[str, ModeLoader] = {
    "plain": ModeLoader(plain.memory, plain.load),
    "verified": ModeLoader(field_products.memory, field_products.load),
    # What it is sent looks otherwise, and is multiplied as there.
    "blinded": ModeLoader(field_products.memory, field_products.load),
}
