"""Plain Flax CNNs, not equivariant to rotation: what the PDO-eConv networks are measured against."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

import pdo_jax as pdo


class MnistRotCNN(nn.Module):
    """The "Z2CNN" of Cohen & Welling (ICML 2016), with MnistRotNet's dropout: 21 620 parameters.

    Six valid 3×3 convolutions (28 → 26 → 24, a 2×2 max pool → 12, → 10 → 8 → 6 → 4), each with batch norm and ReLU,
    then a 4×4 convolution to the classes. Images [n, 28, 28, channels] give logits [n, num_classes].
    """

    features: int = 20
    num_classes: int = 10
    dropout: float = 0.2
    dtype: DTypeLike = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        conv = partial(nn.Conv, use_bias=False, padding="VALID", dtype=self.dtype)
        for layer in range(1, 7):
            x = conv(self.features, (3, 3))(x)
            x = nn.relu(_batch_norm(self, train)(x))
            if layer == 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
            else:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return conv(self.num_classes, (4, 4))(x).squeeze((1, 2))


class ResNetCNN(nn.Module):
    """The pre-activation ResNet of He et al. (ECCV 2016) for small images: 3×3 convolutions, depth 6·blocks + 2.

    A stage for each width, of `blocks` blocks of two convolutions; every stage but the first halves the image. Images
    [n, H, W, channels] give logits [n, num_classes].
    """

    blocks: int
    widths: Sequence[int] = (16, 32, 64)
    num_classes: int = 10
    dtype: DTypeLike = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        x = conv(self.widths[0], (3, 3))(x)
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                y = nn.relu(_batch_norm(self, train)(x))
                shortcut = x if x.shape[-1] == width and strides == 1 else conv(width, (1, 1), strides)(y)
                y = conv(width, (3, 3), strides)(y)
                y = nn.relu(_batch_norm(self, train)(y))
                x = shortcut + conv(width, (3, 3))(y)
        x = nn.relu(_batch_norm(self, train)(x)).mean((1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes)(x)


class UNetCNN(nn.Module):
    """A plain U-Net of the layout of `pdo_jax.networks.UNet`, of 3×3 convolutions on a torus: not equivariant.

    Fields [n, H, W, channels, d] give fields of the same shape.
    """

    widths: Sequence[int]
    blocks: int = 2
    dtype: DTypeLike = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        conv = partial(nn.Conv, kernel_size=(3, 3), padding="CIRCULAR", use_bias=False, dtype=self.dtype)

        def level(x, width):
            for _ in range(self.blocks):
                x = nn.relu(_batch_norm(self, train)(conv(width)(x)))
            return x

        shape, fine = x.shape, []
        x = x.reshape(*shape[:3], -1)
        for k, width in enumerate(self.widths):
            if k:
                fine.append(x)
                x = nn.avg_pool(x, (2, 2), (2, 2))
            x = level(x, width)
        for width, before in zip(self.widths[-2::-1], fine[::-1], strict=True):
            x = pdo.upsample(x, pdo.groups.cyclic(1), periodic=True)
            x = level(jnp.concatenate([before, x], -1), width)
        return conv(shape[3] * shape[4])(x).reshape(shape).astype(jnp.float32)


class ResidualCNN(nn.Module):
    """A plain network of the layout of `residual.ResidualNet`, of 3×3 convolutions on a torus: not equivariant.

    Fields [n, H, W, channels, d] give fields of the same shape.
    """

    width: int
    blocks: int
    dtype: DTypeLike = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        conv = partial(nn.Conv, kernel_size=(3, 3), padding="CIRCULAR", use_bias=False, dtype=self.dtype)
        shape = x.shape
        x = conv(self.width)(x.reshape(*shape[:3], -1))
        for _ in range(self.blocks):
            y = conv(self.width)(nn.relu(_batch_norm(self, train)(x)))
            x = x + conv(self.width)(nn.relu(_batch_norm(self, train)(y)))
        return conv(shape[3] * shape[4])(nn.relu(_batch_norm(self, train)(x))).reshape(shape).astype(jnp.float32)


def _batch_norm(module: nn.Module, train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=module.dtype, axis_name=module.axis_name)
