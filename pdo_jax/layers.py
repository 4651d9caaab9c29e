"""Layers between the convolutions: normalisation, dropout and pooling of fields.

Each is told what it acts on: a :class:`~pdo_jax.groups.Group`, for its regular fields [batch, *space, channels, order], or a
:class:`~pdo_jax.fields.Representation`, for fields [batch, *space, channels, dim]. All but ``group_pool`` take scalars
[batch, *space, channels] too, and reject any other shape.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pdo_jax.fields import Representation, field_axes, group_of
from pdo_jax.groups import Array, Group
from pdo_jax.lowering.channels import inner, scale
from pdo_jax.lowering.layout import arranged, merge, on_platform, restore, split, view


class GroupBatchNorm(nn.Module):
    """Batch normalisation with one mean, variance, scale and bias per channel, shared over batch, space and group.

    y = scale · (x - mean) / sqrt(variance + epsilon) + bias; sharing over the group makes it equivariant. Under ``jax.jit`` on
    a sharded batch the statistics are those of the whole batch; under ``jax.pmap`` or ``jax.shard_map`` give ``axis_name``. The
    variance is taken about a value of the data, so that a mean far larger than the spread costs no accuracy.

    Attributes:
      group: what the field is of: a group, or a representation that permutes its values.
      momentum: of the running averages, kept in the collection "batch_stats".
      epsilon: added to the variance.
      axis_name: a mapped axis over which to average the statistics.
      dtype: of the result, by default that of the input (float32 for integers); parameters and running averages are float32.
      use_running_average: whether it evaluates; told here, as ``nn.Sequential`` needs it, or by ``train`` at every call.

    Shapes: [batch, *space, channels, group.order] or [batch, *space, channels] -> the same.

    Raises:
      ValueError: an input of another shape, a representation that mixes values (use ``FieldBatchNorm``), or a layer that is not
        told, or told twice, whether it trains.

    >>> import jax, pdo_jax as pdo
    >>> norm = pdo.GroupBatchNorm(pdo.groups.cyclic(8))
    >>> x = 300 + jax.random.normal(jax.random.key(0), [2, 9, 9, 5, 8])
    >>> y, variables = norm.init_with_output(jax.random.key(1), x, train=True)
    >>> abs(y.mean()) < 1e-3, abs(y.std() - 1) < 1e-3
    (Array(True, dtype=bool), Array(True, dtype=bool))
    """

    group: Group | Representation
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None
    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool | None = None) -> jax.Array:
        train = trains(self, "use_running_average", train)
        scalars = not field_axes("GroupBatchNorm", x, self.group, permuted=True, remedy="use nonlinearities.FieldBatchNorm")
        x = floating(x[..., None] if scalars else x)
        shape = x.shape[-2:-1]
        factor = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running = {"mean": self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32),
                   "var": self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)}
        wide, first, second = x.astype(jnp.promote_types(x.dtype, jnp.float32)), running["mean"].value, running["var"].value
        if train:
            wide, pivot, first, second = moments(wide, None if self.is_initializing() else self.axis_name)
            update(self, running, {"mean": first + pivot, "var": second})
        factor = factor.astype(wide.dtype) * jax.lax.rsqrt(second.astype(wide.dtype) + self.epsilon)
        shift = bias.astype(wide.dtype) - first.astype(wide.dtype) * factor
        y = arranged((scale(wide, factor) + scale(jnp.ones_like(wide), shift)).astype(self.dtype or x.dtype))
        return y[..., 0] if scalars else y


def moments(x: jax.Array, axis_name: str | None = None) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(x - pivot, pivot, mean of x - pivot, variance), each [channels] but the first.

    The pivot is the mean over one row of one component: any value near the data makes the difference of squares
    E[(x - pivot)²] - E[x - pivot]² stable, and none changes its value, so that nothing is differentiated through it."""
    row = jax.lax.slice_in_dim(x[..., :1], x.shape[1] // 2, x.shape[1] // 2 + 1, axis=1)
    pivot = jax.lax.stop_gradient(mean(row, jnp.ones_like(row), axis_name))
    x = x - scale(jnp.ones_like(x), pivot)
    first = mean(x, jnp.ones_like(x), axis_name)
    return x, pivot, first, jnp.maximum(mean(x, x, axis_name) - first * first, 0)


def mean(x: jax.Array, y: jax.Array, axis_name: str | None) -> jax.Array:
    """[channels]: the mean of x · y; 0 where there is nothing to average."""
    result = inner(x, y) / max(x.size // x.shape[-2], 1)
    return result if axis_name is None else jax.lax.pmean(result, axis_name)


def update(module: nn.Module, running: Mapping[str, nn.Variable[Any]], batch: Mapping[str, jax.Array]) -> None:
    """Moves running averages, by name, towards the values of a batch."""
    if not module.is_initializing():
        for name, variable in running.items():
            value = module.momentum * variable.value + (1 - module.momentum) * batch[name].astype(variable.value.dtype)
            variable.value = value


def trains(module: nn.Module, attribute: str, train: bool | None) -> bool:
    """Whether a layer trains, which its attribute denies, or its call says, never both."""
    if ((fixed := getattr(module, attribute)) is None) == (train is None):
        raise ValueError(f"{type(module).__name__} must be told once whether it trains: by train=True or False when it is "
                         f"called, or by {attribute}=False or True when it is made; got train={train} and {attribute}={fixed}")
    return not fixed if train is None else train


def floating(x: Array) -> jax.Array:
    """Whole numbers, and truth values, become float32."""
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


class GroupDropout(nn.Module):
    """Dropout whose mask is shared over the group axis, and over space too if it drops whole ``channels``.

    Attributes:
      rate: the probability to drop, 0 <= rate < 1.
      group: what the field is of, a group or any representation.
      channels: drop whole channels, not single points.
      deterministic: whether it drops nothing; told here, as ``nn.Sequential`` needs it, or by ``train`` at every call.

    Shapes: [batch, *space, channels, group.order] or [batch, *space, channels] -> the same. Needs the random stream "dropout"
    when training.

    Raises:
      ValueError: a rate outside [0, 1), an input of another shape, or a layer not told, or told twice, whether it trains.

    >>> import jax, pdo_jax as pdo
    >>> layer = pdo.GroupDropout(0.5, pdo.groups.cyclic(4))
    >>> layer.apply({}, jax.numpy.ones([1, 1, 1, 2, 4]), train=True, rngs={"dropout": jax.random.key(0)})[0, 0, 0]
    Array([[0., 0., 0., 0.],
           [2., 2., 2., 2.]], dtype=float32)
    """

    rate: float
    group: Group | Representation
    channels: bool = False
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool | None = None) -> jax.Array:
        train = trains(self, "deterministic", train)
        if not 0 <= self.rate < 1:
            raise ValueError(f"the rate of GroupDropout must lie in [0, 1), got {self.rate}")
        scalars = not field_axes("GroupDropout", x, self.group)
        if not train or self.rate == 0:
            return x
        x = floating(x[..., None] if scalars else x)
        batch, *space, channels, _ = x.shape
        space = [1] * len(space) if self.channels else space
        keep = min(max(round((1 - self.rate) * 2**16), 1), 2**16 - 1)  # to 16 bits
        mask = jax.random.bits(self.make_rng("dropout"), (1, channels, *space, batch), jnp.uint16) < np.uint16(keep)
        y = restore(jnp.where(mask, view(x) * np.asarray(2**16 / keep, x.dtype), np.zeros((), x.dtype)))
        return y[..., 0] if scalars else y


def max_pool(x: Array, group: Group | Representation, window: int = 2, strides: int | None = None) -> jax.Array:
    """Maximum over windows of space, aligned so that every transformation that maps the grid to itself is kept exactly.

    Windows must tile the axis symmetrically: where (size - window) is no multiple of the stride, the window grows by the
    remainder (2 becomes 3 on an odd axis). An even axis gives size / 2 outputs, an odd one (size - 1) / 2.

    Args:
      x: [batch, *space, channels, group.order] or [batch, *space, channels].
      group: what the field is of: a group, or a representation that permutes its values.
      window: points along each axis.
      strides: by default the window.

    Raises:
      ValueError: an x of another shape, a window larger than an axis, or a representation that mixes values.

    >>> import pdo_jax as pdo
    >>> max_pool(jnp.zeros([2, 8, 8, 3, 8]), pdo.groups.cyclic(8)).shape
    (2, 4, 4, 3, 8)
    """
    scalars = not field_axes("max_pool", x, group, permuted=True, remedy="use mean_pool or blur_pool")
    window, strides = _window(x, group, window, strides)
    y = _max_pool(x[..., None] if scalars else x, window, strides)
    return y[..., 0] if scalars else y


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _max_pool(x, window, strides):
    return _in_view(lambda x, first: functools.reduce(jnp.maximum, _windows(x, window, strides, first)), x)


@_max_pool.defjvp
def _max_pool_jvp(window, strides, primals, tangents):
    """Equal shares to all points of a window that attain the maximum, so that the gradient is equivariant at ties too."""
    (x,), (dx,) = primals, tangents
    y = _max_pool(x, window, strides)
    if strides == window and all(size % window == 0 for size in x.shape[1:-2]):
        share = jax.lax.stop_gradient(_in_view(lambda x, y, first: _shares(x, y, window, first), x, y))
        return y, _in_view(lambda t, first: _sums(t, window, first), dx * share)
    hits, share = _hits(jax.lax.stop_gradient(x), jax.lax.stop_gradient(y), window, strides, 1)
    return y, functools.reduce(jnp.add, [v * jnp.where(h, share, jnp.zeros_like(share)) for v, h in zip(
        _windows(dx, window, strides, 1), hits, strict=True)])


def _hits(x, y, window, strides, first):
    """For each point of the windows whether it attains the maximum, and the reciprocal of the number of those that do."""
    hits = [v == y for v in _windows(x, window, strides, first)]
    return hits, 1 / functools.reduce(jnp.add, [h.astype(y.dtype) for h in hits])


def _shares(x, y, window, first):
    """The part of its window's tangent that each point of x passes on, for windows that tile x."""
    share = _hits(x, y, window, window, first)[1]
    for axis in range(first, first + x.ndim - 3):
        y, share = (_spread(a, window, axis) for a in (y, share))
    return jnp.where(x == y, share, jnp.zeros_like(share))


def _sums(x, window, first):
    """Sums over windows that tile x; an axis at a time, since over a mesh of explicit axes only one may be split at once."""
    for axis in range(first, first + x.ndim - 3):
        x = split(x, axis, x.shape[axis] // window).sum(axis + 1, dtype=x.dtype)
    return x


def _spread(x, window, axis):
    """Each entry ``window`` times along an axis."""
    shape = x.shape[:axis + 1] + (window,) + x.shape[axis + 1:]
    return merge(jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape), axis)


def _in_view(function, *fields):
    """A function of fields and of their first axis of space, computed in the order of axes that suits the platform."""
    cpu = lambda *fields: restore(function(*map(view, fields), 2))  # noqa: E731
    return on_platform(cpu, lambda *fields: function(*fields, 1))(*fields)


def mean_pool(x: Array, group: Group | Representation, window: int = 2, strides: int | None = None) -> jax.Array:
    """Mean over windows of space, summed in float32; arguments and alignment as for :func:`max_pool`, any representation."""
    scalars = not field_axes("mean_pool", x, group)
    window, strides = _window(x, group, window, strides)
    x = floating(x[..., None] if scalars else x)

    def mean(x, first):
        views = _windows(x.astype(jnp.promote_types(x.dtype, jnp.float32)), window, strides, first)
        return (functools.reduce(jnp.add, views) / len(views)).astype(x.dtype)

    y = _in_view(mean, x)
    return y[..., 0] if scalars else y


def blur_pool(x: Array, group: Group | Representation) -> jax.Array:
    """Halves the resolution behind a binomial blur (Zhang, ICML 2019), which damps what the coarser grid cannot carry.

    The blur is [1 3 3 1] / 8 on even axes and [1 2 1] / 4 on odd ones, so that it stays symmetric; the weights are divided by
    their sum inside the array, so that constants stay. Sums are in float32.

    Args:
      x: [batch, *space, channels, group.order] or [batch, *space, channels].
      group: what the field is of, a group or any representation.

    Returns:
      [batch, *ceil(space / 2), …], the rest as in x.

    Raises:
      ValueError: an x of another shape.
    """
    field_axes("blur_pool", x, group)
    x = floating(x)
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for axis in range(1, 1 + group_of(group).dim):
        size = x.shape[axis]
        taps = np.array([1, 3, 3, 1] if size % 2 == 0 else [1, 2, 1])
        inside = np.convolve(np.ones(size), taps)[len(taps) - 2:][: size:2][: -(-size // 2)]
        y = jnp.pad(y, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)])
        views = [jax.lax.slice_in_dim(y, k, k + 2 * (len(inside) - 1) + 1, 2, axis) * int(t) for k, t in enumerate(taps)]
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        y = functools.reduce(jnp.add, views) / jnp.asarray(inside.reshape(shape), y.dtype)
    return y.astype(x.dtype)


def group_pool(x: Array, group: Group | Representation, reduce: str = "mean") -> jax.Array:
    """Mean or maximum over the group: a regular field becomes a scalar one, [batch, *space, channels].

    Args:
      x: [batch, *space, channels, group.order].
      group: what the field is of: a group, or a representation that permutes its values.

    Raises:
      ValueError: an x of another shape, a representation that mixes values, or ``reduce`` neither "mean" nor "max".
    """
    if reduce not in ("mean", "max"):
        raise ValueError(f'reduce must be "mean" or "max", got {reduce!r}')
    field_axes("group_pool", x, group, permuted=True, scalars=False)
    return floating(x).mean(-1) if reduce == "mean" else x.max(-1)


def _window(x, group, window, strides):
    """Window and strides as ints, known to fit."""
    strides, space = window if strides is None else strides, x.shape[1:1 + group_of(group).dim]
    for name, value in (("window", window), ("strides", strides)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} of a pool must be an int >= 1, got {value!r}")
    if min(space) < window:
        raise ValueError(f"a pooling window of {window} does not fit a field with {space} points")
    return int(window), int(strides)


def _windows(x, window, strides, first):
    """The strided views of x, whose axes of space start at ``first``: their k-th entries are the points of window k."""
    axes = slice(first, first + x.ndim - 3)
    space = x.shape[axes]
    reach = [window + (size - window) % strides for size in space]
    step = np.ones(x.ndim, int)
    step[axes] = strides
    views = []
    for offset in itertools.product(*map(range, reach)):
        start, stop = np.zeros(x.ndim, int), np.array(x.shape)
        start[axes], stop[axes] = offset, [size - r + o + 1 for size, r, o in zip(space, reach, offset, strict=True)]
        views.append(jax.lax.slice(x, start, stop, step))
    return views
