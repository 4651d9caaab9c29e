"""For flax.nnx: ``import pdo_jax.nnx as pnn`` has a class for each linen module of the library, by its name; docs/nnx.ipynb."""

from pdo_jax.nnx import networks
from pdo_jax.nnx.face import Face, from_linen
from pdo_jax.nnx.layers import (
    FieldBatchNorm,
    FieldNorm,
    GatedNonlinearity,
    GroupBatchNorm,
    GroupConv,
    GroupDropout,
    LiftingConv,
    NormNonlinearity,
    PDOConv,
)
from pdo_jax.nnx.networks import load_pretrained

__all__ = ["Face", "FieldBatchNorm", "FieldNorm", "GatedNonlinearity", "GroupBatchNorm", "GroupConv", "GroupDropout",
           "LiftingConv", "NormNonlinearity", "PDOConv", "from_linen", "load_pretrained", "networks"]
