"""Normalisation and nonlinearities of fields [batch, *space, channels, d] of any representation.

A function of single values commutes with the group only where the representation permutes them. Elsewhere a field may be
scaled by an invariant: the length of each part (norm ReLU), a learned scalar (gate), or a statistic (batch norm). The parts
are the representation's ``blocks``, for a direct sum of irreducible representations exactly these.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pdo_jax.fields import (
    Representation,
    as_field,
    cosets,
    direct_sum,
    field_axes,
    group_of,
    orthonormal_range,
    regular,
    trivial,
)
from pdo_jax.groups import Array, Group
from pdo_jax.layers import GroupBatchNorm, averages, floating, masked, mean, trains, update
from pdo_jax.lowering.channels import along, scale
from pdo_jax.lowering.layout import merge, split


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


def fourier(rep: Representation, fn: Callable[[jax.Array], jax.Array] = nn.relu,
            subgroup: Group | Sequence[int] = (0,)) -> Callable[[jax.Array], jax.Array]:
    """A function of single values, on samples of what a band-limited field is the Fourier series of: y = E⁺ fn(E x).

    E x are the samples (E x)(AH) = ⟨v, ρ(A)^{-1} x⟩ on the cosets of a subgroup H, with one v that H keeps, and E⁺ is the least
    squares solution of E y = z. It commutes with the representation's group exactly, whose action E turns into a permutation,
    and with a continuous group as nearly as the samples resolve ``fn``: take a larger group (cyclic(n): n samples of a circle).

    Args:
      rep: an orthogonal sum of irreducible parts, such as ``fields.band_limited``; a part may come as often as samples tell.
      fn: any function of single values.
      subgroup: H, by default the identity alone: samples on the group. In space the cosets of the rotations about an axis are
        samples on a sphere.

    Returns:
      a function of fields [..., channels, rep.dim], computed in float32 or more.

    Raises:
      ValueError: a representation that does not keep lengths, or that the samples do not determine.

    >>> from pdo_jax import fields, groups
    >>> rep = fields.band_limited(groups.cyclic(16), 2)
    >>> bool(jnp.allclose(fourier(rep, lambda x: x)(x := jnp.arange(5.0)), x, atol=1e-5))
    True
    """
    sets, v, seen = cosets(rep.group, subgroup), np.zeros(rep.dim), {}
    for block, part in zip(rep.blocks, rep.parts, strict=True):
        kept, kind = part.matrices[sets[0]].mean(0), tuple(np.trace(part.matrices, axis1=1, axis2=2).round(6))
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= (rank := round(np.trace(kept))):
            v[block] = orthonormal_range(kept, rank)[:, seen[kind] - 1] * math.sqrt(part.dim)
    samples = rep.matrices[sets[:, 0]] @ v
    if not rep.is_orthogonal or np.linalg.matrix_rank(samples) < rep.dim:
        raise ValueError(f"{len(samples)} samples do not determine a field of {rep!r}: take a smaller subgroup, fewer copies "
                         "of a part, or orthogonal irreducible parts")
    back = np.linalg.pinv(samples)

    def times(x, matrix):
        return jnp.einsum("...i,ji->...j", x, jnp.asarray(matrix, x.dtype), precision="highest")

    def apply(x):
        x = floating(x)
        return times(fn(times(x.astype(jnp.promote_types(x.dtype, jnp.float32)), samples)), back).astype(x.dtype)

    return apply


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
    def __call__(self, x: Array, train: bool | None = None, mask: Array | None = None) -> jax.Array:
        train = trains(self, "use_running_average", train)
        x, back = as_field("FieldBatchNorm", x, self.rep, scalars=False, orthogonal=True)
        options = dict(momentum=self.momentum, epsilon=self.epsilon, axis_name=self.axis_name, dtype=self.dtype)
        parts = []
        for k, (part, rep) in enumerate(_split(self.rep, x)):
            norm = functools.partial(GroupBatchNorm, rep) if rep.is_permutation else _LengthNorm
            parts.append(norm(**options, name=f"block_{k}")(part, train, mask))
        return back(_joined(self.rep, parts))


class FieldNorm(nn.Module):
    """Normalisation of every example by itself: instance, layer or group norm of a field, block by block of its representation.

    y = scale · (x - mean) / sqrt(mean (x - mean)² + epsilon) + bias for a block that is permuted (trivial, regular, quotient),
    and y = scale · x / sqrt(mean x² + epsilon) for any other; means over a group of channels, the block and, with ``space``,
    space. Scale and bias are per channel.

    Attributes:
      group: what the field is of: a group, or an orthogonal representation.
      num_groups: groups of channels: None for each channel by itself (instance norm), 1 for all (layer norm).
      space: whether means are over space too; else every point is normalised by itself.
      epsilon: added to the variance.
      dtype: of the result, by default that of the input; parameters and means are float32.

    Shapes: [batch, *space, channels, d] or [batch, *space, channels] -> the same; with a ``mask`` as in ``GroupBatchNorm``.

    Raises:
      ValueError: an input of another shape, a representation that does not keep lengths, or groups that do not divide channels.

    >>> from pdo_jax import fields, groups
    >>> x = jax.random.normal(jax.random.key(0), [2, 8, 8, 4, 2])
    >>> y, _ = FieldNorm(fields.standard(groups.cyclic(8)), num_groups=2).init_with_output(jax.random.key(1), x)
    >>> (y[0, ..., :2, :] ** 2).mean().round(3)
    Array(1., dtype=float32)
    """

    group: Group | Representation
    num_groups: int | None = None
    space: bool = True
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> jax.Array:
        scalars = x.ndim == group_of(self.group).dim + 2
        x, back = as_field("FieldNorm", x, self.group, orthogonal=True)
        channels, groups = x.shape[-2], x.shape[-2] if self.num_groups is None else self.num_groups
        if groups < 1 or channels % groups:
            raise ValueError(f"num_groups={groups} of FieldNorm must divide its {channels} channels")
        x, mask = masked(floating(x), mask)
        axes, parts = (*(range(1, x.ndim - 2) if self.space else ()), x.ndim - 1, x.ndim), []
        rep = trivial(group_of(self.group)) if scalars else self.group
        rep = rep if isinstance(rep, Representation) else regular(rep)
        for k, (part, block) in enumerate(_split(rep, x)):
            wide = split(part.astype(jnp.promote_types(x.dtype, jnp.float32)), x.ndim - 2, groups)
            where = None if mask is None else jnp.broadcast_to(mask[..., None], wide.shape)
            count = math.prod(wide.shape[axis] for axis in axes) if mask is None else jnp.maximum(
                jnp.sum(where, axes, keepdims=True, dtype=wide.dtype), 1)
            total = functools.partial(jnp.sum, axis=axes, keepdims=True, where=where)
            wide = wide - total(wide) / count if block.is_permutation else wide
            y = merge(wide * jax.lax.rsqrt(total(wide * wide) / count + self.epsilon), x.ndim - 2)
            y = y * along(self.param(f"scale_{k}", nn.initializers.ones, (channels,), jnp.float32).astype(y.dtype), y)
            if block.is_permutation:
                y = y + along(self.param(f"bias_{k}", nn.initializers.zeros, (channels,), jnp.float32).astype(y.dtype), y)
            parts.append(y)
        return back(masked(_joined(rep, parts).astype(self.dtype or x.dtype), mask)[0])


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
        field_axes("NormNonlinearity", x, self.rep, scalars=False, orthogonal=True)
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
    def __call__(self, x, train, mask):
        x, mask = masked(floating(x), mask)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        running = averages(self, train, x.shape[-2:-1], square=jnp.ones)
        factor = self.param("scale", nn.initializers.ones, x.shape[-2:-1], jnp.float32).astype(wide.dtype)
        square = running["square"].value.astype(wide.dtype)
        if train:
            square = mean(wide, wide, None if self.is_initializing() else self.axis_name, mask)
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
