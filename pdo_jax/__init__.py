"""Equivariant convolutions made of partial differential operators (PDO-eConvs) for JAX and Flax."""

from pdo_jax import (
    architecture,
    equivariance,
    export,
    fields,
    groups,
    kernels,
    lowering,
    networks,
    nonlinearities,
    operators,
    steerable,
    stencils,
)
from pdo_jax._version import __version__
from pdo_jax.conv import GroupConv, LiftingConv, PDOConv
from pdo_jax.layers import GroupBatchNorm, GroupDropout
from pdo_jax.lowering.compiler import compiler_options
from pdo_jax.sampling import (
    adaptive_pool,
    blur_pool,
    group_pool,
    max_pool,
    mean_pool,
    norm_max_pool,
    spherical_mask,
    upsample,
)

__all__ = [
    "GroupBatchNorm", "GroupConv", "GroupDropout", "LiftingConv", "PDOConv", "__version__", "adaptive_pool", "architecture",
    "blur_pool", "compiler_options", "equivariance", "export", "fields", "group_pool", "groups", "kernels", "lowering",
    "max_pool", "mean_pool", "networks", "nonlinearities", "norm_max_pool", "operators", "spherical_mask", "steerable",
    "stencils", "upsample",
]
