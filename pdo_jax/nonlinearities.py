"""Normalisation and nonlinearities of fields [batch, *space, channels, d] of any representation.

A function of single values commutes with the group only where the representation permutes them. Elsewhere a field may be
scaled by an invariant: the length of each part (norm ReLU), a learned scalar (gate), or a statistic (batch norm). The parts
are the representation's ``blocks``, for a direct sum of irreducible representations exactly these.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pdo_jax.fields import Representation, direct_sum, field_axes, trivial
from pdo_jax.groups import Array
from pdo_jax.layers import GroupBatchNorm, floating, mean, trains, update
from pdo_jax.lowering.channels import along, scale


def pointwise(rep: Representation, fn: Callable[[jax.Array], jax.Array] = nn.relu) -> Callable[[jax.Array], jax.Array]:
    """The function itself, for a representation that permutes values: trivial, regular, quotients and their direct sums.

    Raises:
      ValueError: the representation mixes values, so that a function of single ones is not equivariant.

    >>> from pdo_jax import fields, groups
    >>> pointwise(fields.regular(groups.cyclic(4)), nn.relu)(jnp.array([-1.0, 2.0]))
    Array([0., 2.], dtype=float32)
    """
    if not rep.is_permutation:
        raise ValueError(f"a pointwise nonlinearity is equivariant only on fields that the group permutes (trivial, regular, "
                         f"quotient), got {rep!r}: use NormNonlinearity or GatedNonlinearity")
    return fn


class FieldBatchNorm(nn.Module):
    """Batch normalisation of a field, block by block of its representation.

    Blocks that are permuted (trivial, regular, quotient) go through :class:`pdo_jax.layers.GroupBatchNorm`, mean and variance
    per channel. Any other has no mean that is invariant: y = scale · x / sqrt(mean x² + epsilon), the mean over batch, space
    and block.

    Attributes:
      rep: an orthogonal representation.

    The others as for ``GroupBatchNorm``.

    Shapes: [batch, *space, channels, rep.dim] -> the same.

    Raises:
      ValueError: a field of another size, or a representation that does not keep lengths.
    """

    rep: Representation
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None
    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool | None = None) -> jax.Array:
        train = trains(self, "use_running_average", train)
        _check("FieldBatchNorm", self.rep, x)
        options = dict(momentum=self.momentum, epsilon=self.epsilon, axis_name=self.axis_name, dtype=self.dtype)
        parts = []
        for k, (part, rep) in enumerate(_split(self.rep, x)):
            norm = functools.partial(GroupBatchNorm, rep) if rep.is_permutation else _LengthNorm
            parts.append(norm(**options, name=f"block_{k}")(part, train))
        return _joined(self.rep, parts)


class NormNonlinearity(nn.Module):
    """Shortens every part of a field by a learned amount: y = ReLU(|x| + b) x / |x|, with |x|² = Σ x² + epsilon.

    Blocks that are permuted take the stronger y = ReLU(x + b). There is one bias for each channel and block. It starts at 0, as
    in Worrall et al., Harmonic Networks, CVPR 2017: the other blocks then pass unchanged, and a field of any size can learn;
    below 0 a field shorter than -b would be lost, and the gradient of b with it.

    Attributes:
      rep: an orthogonal representation.
      epsilon: keeps the gradient finite where a field vanishes.
      bias_init: by default 0.

    Shapes: [batch, *space, channels, rep.dim] -> the same; computed in float32, returned in the input's dtype.

    Raises:
      ValueError: a field of another size, or a representation that does not keep lengths.

    >>> from pdo_jax import fields, groups
    >>> layer = NormNonlinearity(fields.standard(groups.cyclic(8)), bias_init=nn.initializers.constant(-2.5))
    >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([3.0, 4.0]).reshape(1, 1, 1, 1, 2))
    >>> round(float(jnp.linalg.norm(y)), 3)  # from length 5
    2.5
    """

    rep: Representation
    epsilon: float = 1e-5
    bias_init: Callable[..., Any] = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        _check("NormNonlinearity", self.rep, x)
        bias = self.param("bias", self.bias_init, (x.shape[-2], len(self.rep.blocks)), jnp.float32)
        parts, x = [], floating(x)
        for k, (part, rep) in enumerate(_split(self.rep, x.astype(jnp.promote_types(x.dtype, jnp.float32)))):
            b = along(bias[:, k].astype(part.dtype), part)
            if rep.is_permutation:
                parts.append(nn.relu(part + b))
            else:
                length = jnp.sqrt((part ** 2).sum(-1, keepdims=True) + self.epsilon)
                parts.append(nn.relu(length + b) / length * part)
        return _joined(self.rep, parts).astype(x.dtype)


class GatedNonlinearity(nn.Module):
    """Scales every part of a field by the sigmoid of a scalar that the layer before computes for it.

    Attributes:
      rep: any representation; the input has type ``in_rep``, which is ``rep`` and one trivial value for each of its blocks.

    Shapes: [batch, *space, channels, in_rep.dim] -> [batch, *space, channels, rep.dim].

    Raises:
      ValueError: a field of another size.

    >>> from pdo_jax import fields, groups
    >>> GatedNonlinearity(fields.standard(groups.octahedral())).in_rep.dim
    4
    """

    rep: Representation

    @property
    def in_rep(self) -> Representation:
        return direct_sum([self.rep] + [trivial(self.rep.group)] * len(self.rep.blocks))

    def __call__(self, x: Array) -> jax.Array:
        field_axes("GatedNonlinearity", x, self.in_rep, scalars=False)
        gates = jax.nn.sigmoid(x[..., self.rep.dim:])
        return _joined(self.rep, [part * gates[..., k, None] for k, (part, _) in enumerate(_split(self.rep, x))])


class _LengthNorm(nn.Module):
    """Divides by the root of the mean square per channel."""

    momentum: float
    epsilon: float
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        x = floating(x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        running = {"square": self.variable("batch_stats", "square", jnp.ones, x.shape[-2:-1], jnp.float32)}
        factor = self.param("scale", nn.initializers.ones, x.shape[-2:-1], jnp.float32).astype(wide.dtype)
        square = running["square"].value.astype(wide.dtype)
        if train:
            square = mean(wide, wide, None if self.is_initializing() else self.axis_name)
            update(self, running, {"square": square})
        return scale(wide, factor * jax.lax.rsqrt(square + self.epsilon)).astype(self.dtype or x.dtype)


def _split(rep, x):
    """The values of each block, and their representation."""
    for block, part in zip(rep.blocks, rep.parts, strict=True):
        together = block[-1] - block[0] == len(block) - 1
        yield x[..., slice(block[0], block[-1] + 1) if together else block], part


def _joined(rep, parts):
    """The blocks put back in the order of the field's axis."""
    order = np.concatenate(rep.blocks)
    y = jnp.concatenate(parts, -1)
    return y if (np.diff(order) > 0).all() else y[..., np.argsort(order)]


def _check(what, rep, x):
    field_axes(what, x, rep, scalars=False, orthogonal=True)
