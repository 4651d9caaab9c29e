"""Networks built from the layers of this library: the paper's (Shen, He, Lin, Ma, ICML 2020, Section 6), and better ones."""

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pdo_jax import fields, groups, layers, sampling, stencils, weights
from pdo_jax.conv import Frozen, GroupConv, LiftingConv, PDOConv
from pdo_jax.groups import Array


class MnistRotNet(Frozen):
    """A network for rotated MNIST: six 5×5 layers, 28 → 26 → 24 → 12 → 10 → 8 → 6 → 4 points, and a head.

    Each layer is followed by batch normalisation and ``activation``, the second by ``pool``, the others by dropout. The
    defaults are those of a good small network, of 21 142 parameters; ``PAPER["mnist_rot"]`` is the paper's, of p8.

    Attributes:
      num_classes: number of logits.
      group: a group of the plane.
      features: channels of each layer, one number for all six or six numbers.
      head: "invariant" (a pointwise layer of ``head_features`` channels, mean over space, maximum over the group, linear: the
        logits do not change under the group's grid-preserving elements) or "paper" (linear over all points, channels and
        orientations, without bias; not invariant).
      dropout: rate after layers 1, 3, 4, 5 and 6.
      pool: ``max_pool``, ``mean_pool`` or ``blur_pool``.
      activation: a function of the values, one by one.
      ranks: of the kernels of layers 2 to 6, and of that of the head (``rank`` of :class:`pdo_jax.GroupConv`).

    The others as for :class:`pdo_jax.LiftingConv`; ``axis_name`` as for :class:`pdo_jax.GroupBatchNorm`.

    Shapes: [batch, 28, 28, channels] -> [batch, num_classes] float32.
    """

    num_classes: int = 10
    group: groups.Group = groups.cyclic(12)
    features: int | Sequence[int] = 6
    head: str = "invariant"
    head_features: int = 96
    dropout: float = 0.2
    pool: Callable[..., jax.Array] = sampling.max_pool
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    basis: str | int = 2
    scheme: stencils.Scheme = functools.partial(stencils.gaussian_derivative, sigma=1.0)
    frame: Any = 0.0
    lowering: str = "auto"
    dtype: Any = jnp.float32
    axis_name: str | None = None
    ranks: tuple[int | None, int | None] = (None, None)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> jax.Array:
        if self.head not in ("paper", "invariant"):
            raise ValueError(f'head must be "paper" or "invariant", got {self.head!r}')
        widths = self.features if isinstance(self.features, Sequence) else (self.features,) * 6
        if len(widths) != 6:
            raise ValueError(f"features is one number of channels or six, one for each layer, got {self.features}")
        options = dict(group=self.group, lowering=self.lowering, dtype=self.dtype, scheme=self.scheme)
        conv = dict(options, padding=1, basis=self.basis, frame=self.frame)
        x = x.astype(self.dtype)
        for layer, width in enumerate(widths, 1):
            kind = LiftingConv if layer == 1 else functools.partial(GroupConv, rank=self.ranks[0])
            x = kind(width, **conv, name=f"conv{layer}")(x)
            x = self.activation(layers.GroupBatchNorm(self.group, axis_name=self.axis_name, name=f"norm{layer}")(x, train))
            if layer == 2:
                x = self.pool(x, self.group)
            else:
                x = layers.GroupDropout(self.dropout, self.group)(x, train)
        if self.head == "invariant":
            x = GroupConv(self.head_features, kernel_size=1, rank=self.ranks[1], **options, name="head_conv")(x)
            x = self.activation(layers.GroupBatchNorm(self.group, axis_name=self.axis_name, name="head_norm")(x, train))
            x = sampling.group_pool(x.astype(jnp.float32).mean((1, 2), keepdims=True), self.group, "max")
        x = x.reshape(x.shape[0], math.prod(x.shape[1:])).astype(jnp.float32)
        return nn.Dense(self.num_classes, use_bias=self.head != "paper", name="head")(x)


class ResNet(Frozen):
    """The paper's pre-activation ResNet for CIFAR, depth 6 · blocks + 2; :data:`PAPER` holds its settings by name.

    Three stages of ``blocks`` residual blocks of two layers; stages 2 and 3 halve the resolution, and change the width
    through a pointwise group convolution in the shortcut. Then batch normalisation, ReLU, mean over space and a linear layer
    over all channels and orientations (``invariant=False``, the paper's) or over channels after a mean over the group.

    Attributes:
      num_classes: number of logits.
      group: a finite group of the dimension of space.
      widths: channels of the three stages.
      blocks: blocks in each stage.
      downsample: "stride" (the paper's) or "pool" (a 2×2 mean, which keeps quarter turns exact on even grids).
      invariant: whether the head averages over the group.

    The others as for :class:`pdo_jax.LiftingConv`; ``axis_name`` as for :class:`pdo_jax.GroupBatchNorm`.

    Shapes: [batch, *space, channels] -> [batch, num_classes] float32.
    """

    num_classes: int = 10
    group: groups.Group = groups.cyclic(8)
    widths: Sequence[int] = (11, 23, 45)
    blocks: int = 7
    downsample: str = "stride"
    invariant: bool = False
    kernel_size: int = 5
    basis: str | int = "paper"
    scheme: stencils.Scheme = stencils.central_difference
    frame: Any = 0.0
    lowering: str = "auto"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> jax.Array:
        if self.downsample not in ("stride", "pool"):
            raise ValueError(f'downsample must be "stride" or "pool", got {self.downsample!r}')
        options = dict(group=self.group, lowering=self.lowering, dtype=self.dtype, scheme=self.scheme)
        conv = functools.partial(GroupConv, kernel_size=self.kernel_size, basis=self.basis, frame=self.frame, **options)

        def activate(x):
            return nn.relu(layers.GroupBatchNorm(self.group, axis_name=self.axis_name)(x, train))

        x = LiftingConv(self.widths[0], kernel_size=self.kernel_size, basis=self.basis, frame=self.frame, **options)(
            x.astype(self.dtype))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                down = 2 if stage and block == 0 else 1
                y, strides = activate(x), down
                if down == 2 and self.downsample == "pool":
                    x, y, strides = sampling.mean_pool(x, self.group), sampling.mean_pool(y, self.group), 1
                if x.shape[-2] != width or strides != 1:
                    x = GroupConv(width, kernel_size=1, strides=strides, **options)(x)
                y = conv(width, strides=strides)(y)
                x = x + conv(width)(activate(y))
        x = activate(x).astype(jnp.float32).mean(tuple(range(1, 1 + self.group.dim)), keepdims=True)
        x = sampling.group_pool(x, self.group) if self.invariant else x
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], math.prod(x.shape[1:])))


class UNet(Frozen):
    """A U-Net (Ronneberger et al., MICCAI 2015) of regular fields: from an image, or a field, to one on the same points.

    A level is ``blocks`` convolutions, each with batch normalisation and ``activation``. ``pool`` leads to the next one,
    :func:`pdo_jax.upsample` back to the very points that were pooled, where both are joined. An image is lifted, and fields of
    other representations come and go through a :class:`pdo_jax.PDOConv`.

    Attributes:
      group: a finite group of the dimension of space.
      widths: channels of each level, from fine to coarse.
      out: channels of the output, invariant (classes of each pixel), or the representation of an output field.
      in_rep: the representation of the input's fields, by default an image.
      blocks: convolutions of each level, down and up.
      periodic: space is a torus.
      pool: ``max_pool``, ``mean_pool`` or ``blur_pool``.
      activation: a function of the values, one by one.
      remat: keep the inputs of the levels alone in training, and compute the rest again: less memory, more time.

    The others as for :class:`pdo_jax.LiftingConv`; ``axis_name`` as for :class:`pdo_jax.GroupBatchNorm`.

    Shapes: [batch, *space, channels], or with ``in_rep`` [batch, *space, channels, in_rep.dim], -> float32
    [batch, *space, out], or [batch, *space, 1, out.dim].

    Raises:
      ValueError: an input of another shape, or with sizes that cannot be halved so often: at least 2^(levels - 1), and if
        periodic multiples of it, with half a kernel left.

    >>> import pdo_jax as pdo
    >>> p4m = groups.dihedral(4)
    >>> network = UNet(p4m, widths=(2, 4), out=pdo.fields.standard(p4m), in_rep=pdo.fields.determinant(p4m))
    >>> jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros([1, 9, 9, 1, 1]))[0].shape  # a velocity
    (1, 9, 9, 1, 2)
    """

    group: groups.Group
    widths: Sequence[int]
    out: int | fields.Representation
    in_rep: fields.Representation | None = None
    blocks: int = 2
    kernel_size: int = 3
    basis: str | int = 2
    scheme: stencils.Scheme = stencils.central_difference
    frame: Any = 0.0
    periodic: bool = False
    pool: Callable[..., jax.Array] = sampling.max_pool
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    remat: bool = False
    lowering: str = "auto"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> jax.Array:
        group, levels = self.group, len(self.widths)
        self._check(x)
        options = dict(kernel_size=self.kernel_size, scheme=self.scheme, lowering=self.lowering, dtype=self.dtype,
                       padding="CIRCULAR" if self.periodic else "SAME")
        conv = functools.partial(GroupConv, group=group, basis=self.basis, frame=self.frame, **options)
        level = functools.partial(nn.remat(_Level, static_argnums=(2,)) if self.remat else _Level, group, self.activation,
                                  self.axis_name)
        if self.in_rep:
            first = PDOConv(self.widths[0], self.in_rep, fields.regular(group), **options)
        else:
            first = LiftingConv(self.widths[0], group, basis=self.basis, frame=self.frame, **options)
        x, fine = x.astype(self.dtype), []
        for k, width in enumerate(self.widths):
            if k:
                fine.append(x)
                x = self.pool(x, group, periodic=self.periodic)
            x = level([conv(width) if k or n else first for n in range(self.blocks)], name=f"down{k}")(x, train)
        for k in reversed(range(levels - 1)):
            x = sampling.upsample(x, group, sizes=fine[k].shape[1:1 + group.dim], periodic=self.periodic)
            x = jnp.concatenate([fine[k], x], -2)
            x = level([conv(self.widths[k]) for _ in range(self.blocks)], name=f"up{k}")(x, train)
        if isinstance(self.out, fields.Representation):
            x = PDOConv(1, fields.regular(group), self.out, **options, name="head")(x)
        else:
            x = nn.Dense(self.out, name="head")(sampling.group_pool(x.astype(jnp.float32), group))
        return x.astype(jnp.float32)

    def _check(self, x):
        """Sizes that can be halved level by level; the axes of x its first layer checks."""
        dim, step = self.group.dim, 2 ** (len(self.widths) - 1)
        space, least = x.shape[1:1 + dim], step * max(1, self.kernel_size // 2) if self.periodic else step
        bad = [size for size in space if size < least or self.periodic and size % step]
        if bad and x.ndim == dim + (3 if self.in_rep else 2):
            wanted = f"multiples of {step} from {least} on" if self.periodic else f"of at least {least}"
            raise ValueError(f"a {'periodic ' * self.periodic}UNet of {len(self.widths)} levels takes sizes {wanted} along "
                             f"every axis, got {list(space)}: crop or pad x, or give fewer widths")


class _Level(nn.Module):
    """Convolutions, each with batch normalisation and an activation."""

    group: groups.Group
    activation: Callable[[jax.Array], jax.Array]
    axis_name: str | None
    convs: Sequence[nn.Module]

    @nn.compact
    def __call__(self, x, train):
        for conv in self.convs:
            x = self.activation(layers.GroupBatchNorm(self.group, axis_name=self.axis_name)(conv(x), train))
        return x


PAPER: dict[str, Callable[..., nn.Module]] = {
    "mnist_rot": functools.partial(MnistRotNet, group=groups.cyclic(8), features=7, head="paper", dropout=0.2,
                                   activation=nn.relu, basis="paper", scheme=stencils.central_difference,
                                   frame=math.pi / 8),  # 26 747
    "p6": functools.partial(ResNet, group=groups.cyclic(6), widths=(6, 13, 26), blocks=4),  # 0.36M
    "p6m": functools.partial(ResNet, group=groups.dihedral(6), widths=(5, 10, 18), blocks=4),  # 0.37M
    "p8": functools.partial(ResNet, group=groups.cyclic(8), widths=(11, 23, 45), blocks=7),  # 2.62M
    "p8_wide": functools.partial(ResNet, group=groups.cyclic(8), widths=(20, 40, 80), blocks=4),  # 4.6M
}
"""The networks of the paper's table; the other attributes are left to set: ``PAPER["p8"](num_classes=100)``.

The first is for rotated MNIST, the others are ResNets for CIFAR. The paper gives the sizes; the widths of "p6" and "p6m" are
those nearest to the plain network's 16, 32, 64 that have them."""


class Normalised(nn.Module):
    """A network behind the normalisation of its images: inner((x - mean) / deviation), for each channel.

    Shapes: those of the inner network.
    """

    inner: nn.Module
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, x: Array, train: bool = False) -> jax.Array:
        return self.inner((x - jnp.asarray(self.mean)) / jnp.asarray(self.deviation), train)


class Pretrained(NamedTuple):
    """What is known of a trained network: its size, test error (a share), data set, and the licence of its weights."""

    parameters: int
    test_error: float
    data: str
    licence: str


PRETRAINED: dict[str, Pretrained] = {
    "mnist_rot_best": Pretrained(25_922, 0.00958, "mnist_rot/regenerated", "MIT"),
    "mnist_rot_small": Pretrained(21_142, 0.01138, "mnist_rot/regenerated", "MIT"),
    "mnist_rot_paper": Pretrained(26_747, 0.02214, "mnist_rot/regenerated", "MIT"),
    "mnist_rot_augmented_small": Pretrained(62_050, 0.00924, "mnist_rot/regenerated", "MIT"),
    "mnist_rot_augmented": Pretrained(176_626, 0.00904, "mnist_rot/regenerated", "MIT"),
    "mnist_rot_deformed_long": Pretrained(62_050, 0.00854, "mnist_rot/regenerated", "MIT"),
    "mnist_rot_tapered_deformed": Pretrained(259_946, 0.00826, "mnist_rot/regenerated", "MIT"),
}
"""The trained networks by name; see ``docs/models.md``."""


def load_pretrained(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A trained network and its variables; the network takes images in [0, 1] as they are, [batch, *space, channels].

    Args:
      name: one of :data:`PRETRAINED`.

    Returns:
      (network, variables), the variables as numpy arrays.

    Raises:
      ValueError: an unknown name.

    >>> network, variables = load_pretrained("mnist_rot_best")
    >>> network.apply(variables, jnp.zeros([1, 28, 28, 1])).shape
    (1, 10)
    """
    if name not in PRETRAINED:
        near = difflib.get_close_matches(str(name), PRETRAINED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "the names are " + ", ".join(PRETRAINED)
        raise ValueError(f"no trained network {name!r}; {hint}")
    return weights.load(Path(__file__).parent / "pretrained" / f"{name}.safetensors")
