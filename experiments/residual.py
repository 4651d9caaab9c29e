"""A residual network from fields to fields on a torus, at one resolution; `baselines` has a plain one of the same layout."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import pdo_jax as pdo


class ResidualNet(nn.Module):
    """Pre-activation residual blocks (He et al., ECCV 2016) of regular fields between a field of `rep` and another.

    Each block is two convolutions of 3×3 points and of all operators up to order 2, behind batch norm and ReLU; one layer leads
    from `rep` to the regular fields, one back.

    Shapes: [batch, *space, channels, rep.dim] -> [batch, *space, 1, rep.dim] float32.
    """

    rep: pdo.fields.Representation
    width: int
    blocks: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        group, regular = self.rep.group, pdo.fields.regular(self.rep.group)
        options = dict(kernel_size=3, padding="CIRCULAR", dtype=self.dtype)
        conv = partial(pdo.GroupConv, self.width, group, basis=2, **options)

        def activate(x):
            return nn.relu(pdo.GroupBatchNorm(group, axis_name=self.axis_name)(x, train))

        x = pdo.PDOConv(self.width, self.rep, regular, **options)(x.astype(self.dtype))
        for _ in range(self.blocks):
            x = x + conv()(activate(conv()(activate(x))))
        return pdo.PDOConv(1, regular, self.rep, **options)(activate(x)).astype(jnp.float32)
