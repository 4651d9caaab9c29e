"""Equivariant convolutions made of partial differential operators (PDO-eConvs) for JAX and Flax."""

from pdo_jax import equivariance, fields, groups, kernels, lowering, networks, operators, steerable, stencils
from pdo_jax.conv import GroupConv, LiftingConv, PDOConv
from pdo_jax.layers import GroupBatchNorm, GroupDropout, blur_pool, group_pool, max_pool, mean_pool

__version__ = "0.1.0"

__all__ = [
    "GroupBatchNorm", "GroupConv", "GroupDropout", "LiftingConv", "PDOConv", "blur_pool", "equivariance", "fields", "group_pool",
    "groups", "kernels", "lowering", "max_pool", "mean_pool", "networks", "operators", "steerable", "stencils",
]
