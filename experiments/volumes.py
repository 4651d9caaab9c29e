"""Small networks for volumes: one of PDO-eConvs for any group of space, and a plain 3-D CNN of the same layout."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import pdo_jax as pdo


class VolumeNet(nn.Module):
    """Three PDO-eConvs of all operators up to order 2 on 3×3×3 points, and an invariant head.

    The first has stride 2 and is followed by a blurred halving, the last has no padding: 17 → 9 → 5 → 5 → 3 points along an
    axis; odd sizes keep every element that maps the grid to itself exact. After each come batch norm and ReLU, as after a
    pointwise layer of ``head_features`` channels; then the mean over space, the maximum over the group, and a linear layer.

    Shapes: [batch, D, D, D, channels] -> logits [batch, num_classes] float32.
    """

    group: pdo.groups.Group
    widths: Sequence[int]
    head_features: int
    num_classes: int = 8
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        options = dict(group=self.group, dtype=self.dtype)
        operators = dict(options, kernel_size=3, basis=2)

        def activate(x):
            return nn.relu(pdo.GroupBatchNorm(self.group, axis_name=self.axis_name)(x, train))

        first, second, third = self.widths
        x = pdo.LiftingConv(first, strides=2, **operators)(x)
        x = pdo.GroupConv(second, **operators)(pdo.blur_pool(activate(x), self.group))
        x = pdo.GroupConv(third, padding="VALID", **operators)(activate(x))
        x = activate(pdo.GroupConv(self.head_features, kernel_size=1, **options)(activate(x)))
        x = pdo.group_pool(x.astype(jnp.float32).mean((1, 2, 3), keepdims=True), self.group, "max")
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class VolumeCNN(nn.Module):
    """The same layout in plain 3×3×3 convolutions: not equivariant. Shapes and attributes as for :class:`VolumeNet`."""

    widths: Sequence[int]
    head_features: int
    num_classes: int = 8
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)

        def activate(x):
            norm = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, axis_name=self.axis_name)
            return nn.relu(norm(x))

        first, second, third = self.widths
        x = conv(first, (3, 3, 3), 2, padding=1)(x)
        x = conv(second, (3, 3, 3))(pdo.blur_pool(activate(x), pdo.groups.octahedral()))
        x = conv(third, (3, 3, 3), padding="VALID")(activate(x))
        x = activate(conv(self.head_features, (1, 1, 1))(activate(x)))
        return nn.Dense(self.num_classes)(x.astype(jnp.float32).mean((1, 2, 3)))
