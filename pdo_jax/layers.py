"""Layers between the convolutions: normalisation, dropout and pooling of fields [batch, *space, channels, group]."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pdo_jax.lowering.layout import on_platform, restore, view


class GroupBatchNorm(nn.Module):
    """Batch normalisation with one mean, variance, scale and bias per channel, shared over batch, space and group.

    y = scale · (x - mean) / sqrt(variance + epsilon) + bias; sharing over the group makes it equivariant. Under ``jax.jit`` on
    a sharded batch the statistics are those of the whole batch; under ``jax.pmap`` give ``axis_name``.

    Attributes:
      momentum: of the running averages, kept in the collection "batch_stats".
      epsilon: added to the variance.
      axis_name: a mapped axis over which to average the statistics.
      dtype: of the result, by default that of the input; statistics are float32.

    Shapes: [batch, *space, channels, group] -> the same.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool):
        channels = x.shape[-2]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        dtype = self.dtype or x.dtype
        if not train:
            factor = scale * jax.lax.rsqrt(var.value + self.epsilon)
            return (x.astype(jnp.float32) * factor[:, None] + (bias - mean.value * factor)[:, None]).astype(dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        y, batch_mean, batch_var = _batch_norm(x, scale, bias, self.epsilon, axis_name, jnp.dtype(dtype))
        if not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm(x, scale, bias, epsilon, axis_name, dtype):
    """(y, mean, variance); derived by hand, since two passes over x are all that it needs in either direction."""
    return _batch_norm_forward(x, scale, bias, epsilon, axis_name, dtype)[0]


def _batch_norm_forward(x, scale, bias, *options):
    y, mean, var, inverse = _by_channel(_normalise, options, x, scale, bias)
    return (y, mean, var), (x, scale, mean, inverse)


def _batch_norm_backward(epsilon, axis_name, dtype, residuals, cotangents):
    x, scale, mean, inverse = residuals
    return _by_channel(_normalise_adjoint, (axis_name,), x, cotangents[0], scale, mean, inverse)


def _normalise(options, view, restore, total, x, scale, bias):
    (epsilon, axis_name, dtype), wide, count = options, view(x), x.size // x.shape[-2]
    mean, square = total(wide) / count, total(wide * wide) / count
    if axis_name is not None:
        mean, square = jax.lax.pmean((mean, square), axis_name)
    var = jnp.maximum(square - mean * mean, 0)
    inverse = jax.lax.rsqrt(var + epsilon)
    factor = scale * inverse
    return restore((wide * factor[:, None] + (bias - mean * factor)[:, None]).astype(dtype)), mean, var, inverse


def _normalise_adjoint(options, view, restore, total, x, dy, scale, mean, inverse):
    wide, dy, count = view(x), view(dy), x.size // x.shape[-2]
    dbias = total(dy)
    dscale = (total(dy * wide) - mean * dbias) * inverse
    m_bias, m_scale = dbias, dscale
    if options[0] is not None:
        m_bias, m_scale = jax.lax.pmean((dbias, dscale), options[0])
    slope = scale * inverse * inverse * m_scale / count
    constant = scale * inverse * m_bias / count - slope * mean
    dx = (scale * inverse)[:, None] * dy - slope[:, None] * wide - constant[:, None]
    return restore(dx.astype(x.dtype)), dscale, dbias


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_channel(function, options, x, *rest):
    """``function`` with a float32 view of arrays like x, channels before the last axis, its inverse, and sums over all else.

    On a CPU the view is [components, channels, all else] and the sum is one over components, which fuses with what it sums, and
    then a matrix product; elsewhere the view is x."""
    shape = view(x).shape
    cpu = functools.partial(function, options, lambda a: view(a).reshape(*shape[:2], -1).astype(jnp.float32),
                            lambda a: restore(a.reshape(shape)), lambda a: a.sum(0) @ jnp.ones(a.shape[2]))
    default = functools.partial(function, options, lambda a: a.astype(jnp.float32), lambda a: a,
                                lambda a: a.sum((*range(x.ndim - 2), x.ndim - 1)))
    return jax.lax.platform_dependent(x, *rest, cpu=cpu, default=default)


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


class GroupDropout(nn.Module):
    """Dropout whose mask is shared over the group axis, and over space too if it drops whole ``channels``.

    Attributes:
      rate: the probability to drop, 0 <= rate < 1. channels: drop whole channels, not single points.

    Shapes: [batch, *space, channels, group] -> the same. Needs the random stream "dropout" when training.
    """

    rate: float
    channels: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        if not 0 <= self.rate < 1:
            raise ValueError(f"the rate of GroupDropout must lie in [0, 1), got {self.rate}")
        if not train or self.rate == 0:
            return x
        batch, *space, channels, _ = x.shape
        space = [1] * len(space) if self.channels else space
        keep = min(max(round((1 - self.rate) * 2**16), 1), 2**16 - 1)  # to 16 bits
        mask = jax.random.bits(self.make_rng("dropout"), (1, channels, *space, batch), jnp.uint16) < keep
        return restore(jnp.where(mask, view(x) * np.float32(2**16 / keep).astype(x.dtype), 0))


def max_pool(x, window: int = 2, strides: int | None = None):
    """Maximum over windows of space, aligned so that every transformation that maps the grid to itself is kept exactly.

    Windows must tile the axis symmetrically: where (size - window) is no multiple of the stride, the window grows by the
    remainder (2 becomes 3 on an odd axis). An even axis gives size / 2 outputs, an odd one (size - 1) / 2.

    Args:
      x: [batch, *space, channels, group].
      window: points along each axis.
      strides: by default the window.

    Raises:
      ValueError: a window larger than an axis.
    """
    return _max_pool(x, window, strides)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x, window, strides):
    return _in_view(lambda x, first: functools.reduce(jnp.maximum, _windows(x, window, strides, first)), x)


def _max_pool_forward(x, window, strides):
    y = _max_pool(x, window, strides)
    return y, (x, y)


def _max_pool_backward(window, strides, residuals, dy):
    """Equal shares to all points of a window that attain the maximum, so that the gradient is equivariant at ties too."""

    def gradient(x, y, dy, first):
        views, back = jax.vjp(lambda x: _windows(x, window, strides, first), x)
        hits = [v == y for v in views]
        share = dy / functools.reduce(jnp.add, [h.astype(dy.dtype) for h in hits])
        if len(hits) == window ** (x.ndim - 3) and strides in (None, window):  # windows tile x: compare with y spread over them
            for axis in range(first, first + x.ndim - 3):
                y, share = (_spread(a, window, axis) for a in (y, share))
            return jnp.where(x == y, share, 0)
        return back([jnp.where(h, share, 0) for h in hits])[0]

    return (_in_view(gradient, *residuals, dy),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _spread(x, window, axis):
    """Each entry ``window`` times along an axis."""
    shape = x.shape[:axis + 1] + (window,) + x.shape[axis + 1:]
    return jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape).reshape(*x.shape[:axis], -1, *x.shape[axis + 1:])


def _in_view(function, *fields):
    """A function of fields and of their first axis of space, computed in the order of axes that suits the platform."""
    cpu = lambda *fields: restore(function(*map(view, fields), 2))  # noqa: E731
    return on_platform(cpu, lambda *fields: function(*fields, 1))(*fields)


def mean_pool(x, window: int = 2, strides: int | None = None):
    """Mean over windows of space; arguments and alignment as for :func:`max_pool`."""

    def mean(x, first):
        views = _windows(x, window, strides, first)
        return functools.reduce(jnp.add, views) / len(views)

    return _in_view(mean, x)


def blur_pool(x):
    """Halves the resolution behind a binomial blur (Zhang, ICML 2019), which damps what the coarser grid cannot carry.

    The blur is [1 3 3 1] / 8 on even axes and [1 2 1] / 4 on odd ones, so that it stays symmetric; the weights are divided by
    their sum inside the array, so that constants stay.

    Args:
      x: [batch, *space, channels, group].

    Returns:
      [batch, *ceil(space / 2), channels, group].
    """
    for axis in range(1, x.ndim - 2):
        size = x.shape[axis]
        taps = np.array([1, 3, 3, 1] if size % 2 == 0 else [1, 2, 1])
        inside = np.convolve(np.ones(size), taps)[len(taps) - 2:][: size:2][: -(-size // 2)]
        x = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)])
        views = [jax.lax.slice_in_dim(x, k, k + 2 * (len(inside) - 1) + 1, 2, axis) * int(t) for k, t in enumerate(taps)]
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        x = functools.reduce(jnp.add, views) / jnp.asarray(inside.reshape(shape), x.dtype)
    return x


def group_pool(x, reduce: str = "mean"):
    """Mean or maximum over the group: a regular field becomes a scalar one, [batch, *space, channels].

    Raises:
      ValueError: ``reduce`` is neither "mean" nor "max".
    """
    if reduce not in ("mean", "max"):
        raise ValueError(f'reduce must be "mean" or "max", got {reduce!r}')
    return x.mean(-1) if reduce == "mean" else x.max(-1)


def _windows(x, window, strides, first):
    """The strided views of x, whose axes of space start at ``first``: their k-th entries are the points of window k."""
    strides = window if strides is None else strides
    if window < 1 or strides < 1:
        raise ValueError(f"window and strides must be positive, got {window} and {strides}")
    axes = slice(first, first + x.ndim - 3)
    space = x.shape[axes]
    if min(space) < window:
        raise ValueError(f"a pooling window of {window} does not fit a field with {space} points")
    reach = [window + (size - window) % strides for size in space]
    step = np.ones(x.ndim, int)
    step[axes] = strides
    views = []
    for offset in itertools.product(*map(range, reach)):
        start, stop = np.zeros(x.ndim, int), np.array(x.shape)
        start[axes], stop[axes] = offset, [size - r + o + 1 for size, r, o in zip(space, reach, offset, strict=True)]
        views.append(jax.lax.slice(x, start, stop, step))
    return views
