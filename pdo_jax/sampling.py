"""Resampling of space: pooling of windows, blur, upsampling, and pooling over the group.

Every function is told what it acts on, as in :mod:`pdo_jax.layers`. Points are placed symmetrically about the centre of the
array, for even sizes and odd ones, so that every transformation that maps the grid to itself is kept exactly.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pdo_jax.fields import Representation, as_field, cosets, field_axes
from pdo_jax.groups import Array, Group
from pdo_jax.layers import floating
from pdo_jax.lowering.layout import continued, extended, merge, on_platform, restore, split, view


def max_pool(x: Array, group: Group | Representation, window: int = 2, strides: int | None = None, *,
             periodic: bool = False) -> jax.Array:
    """Maximum over windows of space.

    Windows must tile the axis symmetrically: where (size - window) is no multiple of the stride, the window grows by the
    remainder (2 becomes 3 on an odd axis). An even axis gives size / 2 outputs, an odd one (size - 1) / 2. Antialiased (Zhang,
    ICML 2019), with outputs of the same sizes, it is ``blur_pool(max_pool(x, group, 2, 1), group)``.

    Args:
      x: [batch, *space, channels, group.order] or [batch, *space, channels].
      group: what the field is of: a group, or a representation that permutes its values.
      window: points along each axis.
      strides: by default the window.
      periodic: space is a torus: windows go around its edges, one for every ``strides`` points, and grow until they lie
        symmetrically about these (3 becomes 4 at stride 2).

    Raises:
      ValueError: an x of another shape, a window larger than an axis, a periodic axis that is no multiple of the stride, or a
        representation that mixes values.

    >>> import pdo_jax as pdo
    >>> max_pool(jnp.zeros([2, 8, 8, 3, 8]), pdo.groups.cyclic(8)).shape
    (2, 4, 4, 3, 8)
    """
    x, back = as_field("max_pool", x, group, permuted=True, remedy="use mean_pool, norm_max_pool or blur_pool")
    return back(_max_pool(*_window(x, window, strides, periodic)))


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


def mean_pool(x: Array, group: Group | Representation, window: int = 2, strides: int | None = None, *,
              periodic: bool = False) -> jax.Array:
    """Mean over windows of space, summed in float32; arguments and alignment as for :func:`max_pool`, any representation."""
    x, back = as_field("mean_pool", x, group)
    x, window, strides = _window(floating(x), window, strides, periodic)

    def mean(x, first):
        views = _windows(_wide(x), window, strides, first)
        return (functools.reduce(jnp.add, views) / len(views)).astype(x.dtype)

    return back(_in_view(mean, x))


def norm_max_pool(x: Array, rep: Representation, window: int = 2, strides: int | None = None, *,
                  periodic: bool = False) -> jax.Array:
    """The longest value of every window of space, such as of vectors; the mean of those that are equally long.

    Arguments and alignment as for :func:`max_pool`.

    Args:
      x: [batch, *space, channels, rep.dim].
      rep: an orthogonal representation; the length is that of all of a channel's values.

    Raises:
      ValueError: as for :func:`max_pool`; a representation that does not keep lengths.

    >>> from pdo_jax import fields, groups
    >>> x = jnp.array([[3.0, 4.0], [0.0, -6.0]]).reshape(1, 1, 2, 1, 2)
    >>> norm_max_pool(jnp.tile(x, (1, 2, 1, 1, 1)), fields.standard(groups.cyclic(4)))[0, 0, 0]
    Array([[ 0., -6.]], dtype=float32)
    """
    x, back = as_field("norm_max_pool", x, rep, scalars=False, orthogonal=True)
    x, window, strides = _window(floating(x), window, strides, periodic)
    views = _windows(x, window, strides, 1)
    lengths = [(jax.lax.stop_gradient(_wide(v)) ** 2).sum(-1, keepdims=True) for v in views]
    longest = functools.reduce(jnp.maximum, lengths)
    hits = [(length == longest).astype(longest.dtype) for length in lengths]
    total = functools.reduce(jnp.add, [hit * v.astype(hit.dtype) for hit, v in zip(hits, views, strict=True)])
    return back((total / functools.reduce(jnp.add, hits)).astype(x.dtype))


def blur_pool(x: Array, group: Group | Representation, *, periodic: bool = False) -> jax.Array:
    """Halves the resolution behind a binomial blur (Zhang, ICML 2019), which damps what the coarser grid cannot carry.

    The blur is [1 3 3 1] / 8 on even axes and [1 2 1] / 4 on odd ones, so that it stays symmetric; the weights are divided by
    their sum inside the array, so that constants stay. Sums are in float32.

    Args:
      x: [batch, *space, channels, group.order] or [batch, *space, channels].
      group: what the field is of, a group or any representation.
      periodic: space is a torus, of even axes.

    Returns:
      [batch, *ceil(space / 2), …], the rest as in x.

    Raises:
      ValueError: an x of another shape, or a periodic axis that is odd.
    """
    x, back = as_field("blur_pool", x, group)
    if periodic:
        _divisible(x.shape[1:-2], 2)
    x = floating(x)
    y = _wide(x)
    for axis in range(1, x.ndim - 2):
        size = x.shape[axis]
        taps = np.array([1, 3, 3, 1] if size % 2 == 0 else [1, 2, 1])
        inside = np.convolve(np.ones(size), taps)[len(taps) - 2:][: size:2][: -(-size // 2)]
        y = extended(y, axis, 1, 1, "wrap") if periodic else jnp.pad(y, [(int(i == axis),) * 2 for i in range(x.ndim)])
        views = [jax.lax.slice_in_dim(y, k, k + 2 * (len(inside) - 1) + 1, 2, axis) * int(t) for k, t in enumerate(taps)]
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        y = functools.reduce(jnp.add, views) / (taps.sum() if periodic else jnp.asarray(inside.reshape(shape), y.dtype))
    return back(y.astype(x.dtype))


def upsample(x: Array, group: Group | Representation, factor: int = 2, method: str = "linear", *,
             sizes: Sequence[int] | None = None, periodic: bool = False) -> jax.Array:
    """A finer grid of the same centre, with ``factor`` times as many points to a length.

    Along each axis, of n points here and s there, point j lies at p_j = (n - 1) / 2 + (j - (s - 1) / 2) / factor of the coarse
    grid, and is interpolated between its two neighbours; beyond the outermost ones the edge is repeated. With s = 2n it lies
    as a pool of window 2 takes it on an even axis; s = 2n + 1 does so on an odd axis; s = 2n - 1 keeps the coarse points, and
    goes back from ``blur_pool`` and convolutions of stride 2 on odd axes. Sums are in float32.

    Args:
      x: [batch, *space, channels, group.order] or [batch, *space, channels].
      group: what the field is of, a group or any representation.
      factor: a whole number.
      method: "linear" (in each axis: bilinear, trilinear), or "nearest", the mean of two that are equally near.
      sizes: points along each axis of the output, such as the shape of what was pooled, by default factor · n; from
        factor · (n - 1) + 1 to factor · (n + 1) - 1.
      periodic: space is a torus; the sizes are factor · n.

    Raises:
      ValueError: an x of another shape, an unknown method, or sizes that do not belong to it.

    >>> from pdo_jax import groups
    >>> x = jnp.array([0.0, 4.0, 8.0]).reshape(1, 3, 1)
    >>> upsample(x, groups.reflection(1)).ravel()
    Array([0., 1., 3., 5., 7., 8.], dtype=float32)
    >>> upsample(x, groups.reflection(1), sizes=[5]).ravel()
    Array([0., 2., 4., 6., 8.], dtype=float32)
    """
    x, back = as_field("upsample", x, group)
    _positive("factor of upsample", factor)
    if method not in ("linear", "nearest"):
        raise ValueError(f'method of upsample must be "linear" or "nearest", got {method!r}')
    space = x.shape[1:-2]
    sizes = tuple(factor * n for n in space) if sizes is None else tuple(sizes)
    for size in sizes:
        _positive("each of the sizes of upsample", size)
    if len(sizes) != len(space) or any(abs(s - factor * n) >= (1 if periodic else factor) for s, n in zip(
            sizes, space, strict=True)):
        raise ValueError(f"sizes of upsample must be {'equal to' if periodic else f'within {factor - 1} of'} "
                         f"{[factor * n for n in space]}, {factor} times a field with {space} points, got {sizes}")
    x = floating(x)

    def finer(x, first):
        y = _wide(x)
        for axis, size in enumerate(sizes, first):
            y = _finer(y, axis, size, int(factor), method, "wrap" if periodic else "edge")
        return y.astype(x.dtype)

    return back(_in_view(finer, x))


def _finer(x, axis, size, factor, method, edges):
    """An axis interpolated to ``size`` points: in turn those that lie between two coarse ones in one way."""
    count = -(-size // factor)  # of each kind
    places = [divmod(factor * (x.shape[axis] - 1) + 2 * r - (size - 1), 2 * factor) for r in range(factor)]
    low, high = -min(0, *(p for p, _ in places)), max(p for p, _ in places) + count + 1 - x.shape[axis]
    x, kinds = extended(x, axis, low, max(0, high), edges), []
    for place, rest in places:
        share = rest / (2 * factor) if method == "linear" else (np.sign(rest - factor) + 1) / 2
        before, behind = (jax.lax.slice_in_dim(x, k, k + count, axis=axis) for k in (low + place, low + place + 1))
        kinds.append(before * float(1 - share) + behind * float(share))
    return jax.lax.slice_in_dim(merge(jnp.stack(kinds, axis + 1), axis), 0, size, axis=axis)


def group_pool(x: Array, group: Group | Representation, reduce: str = "mean", *,
               subgroup: Group | Sequence[int] | None = None) -> jax.Array:
    """Mean or maximum over the group: a regular field becomes a scalar one, [batch, *space, channels].

    Args:
      x: [batch, *space, channels, group.order].
      group: what the field is of: a group, or a representation that permutes its values.
      subgroup: H, to pool over its cosets AH alone: a field of ``fields.quotient(group, H)`` remains,
        [batch, *space, channels, order / |H|]. Over the reflection of dihedral(n) this is a regular field of cyclic(n).

    Raises:
      ValueError: an x of another shape, a representation that mixes values, ``reduce`` neither "mean" nor "max", or a subgroup
        that is none, or of a representation.
    """
    if reduce not in ("mean", "max"):
        raise ValueError(f'reduce must be "mean" or "max", got {reduce!r}')
    field_axes("group_pool", x, group, permuted=True, scalars=False)
    if subgroup is not None:
        if not isinstance(group, Group):
            raise ValueError(f"group_pool over a subgroup takes regular fields of a Group, got {group!r}")
        x = x[..., cosets(group, subgroup)]
    return floating(x).mean(-1) if reduce == "mean" else x.max(-1)


def adaptive_pool(x: Array, group: Group | Representation, sizes: int | Sequence[int], reduce: str = "mean") -> jax.Array:
    """Mean or maximum over windows of the size that gives so many points.

    Along an axis point k of s takes the points from floor(k n / s) to before ceil((k + 1) n / s) of n.

    Args:
      x: [batch, *space, channels, group.order] or [batch, *space, channels].
      group: what the field is of: a group, or a representation; one that permutes its values for the maximum.
      sizes: points of the result, for all axes or each.

    Raises:
      ValueError: an x of another shape, more points than there are, ``reduce`` neither "mean" nor "max", or a maximum of a
        representation that mixes values.

    >>> from pdo_jax import groups
    >>> adaptive_pool(jnp.arange(5.0).reshape(1, 5, 1), groups.reflection(1), 2).ravel()
    Array([1., 3.], dtype=float32)
    """
    if reduce not in ("mean", "max"):
        raise ValueError(f'reduce must be "mean" or "max", got {reduce!r}')
    x, back = as_field("adaptive_pool", x, group, permuted=reduce == "max")
    space = x.shape[1:-2]
    sizes = tuple(sizes) if isinstance(sizes, Sequence) else (sizes,) * len(space)
    for size in sizes:
        _positive("each of the sizes of adaptive_pool", size)
    if len(sizes) != len(space) or any(s > n for s, n in zip(sizes, space, strict=True)):
        raise ValueError(f"sizes of adaptive_pool must be at most the {space} points of the field, for each axis, got {sizes}")
    axes, points = tuple(range(1, 1 + len(space))), []
    x = _wide(floating(x)) if reduce == "mean" else x
    for place in itertools.product(*map(range, sizes)):
        box = x[(slice(None), *(slice(k * n // s, -(-(k + 1) * n // s)) for k, n, s in zip(place, space, sizes, strict=True)))]
        points.append(box.mean(axes) if reduce == "mean" else box.max(axes))
    return back(jnp.stack(points, 1).reshape(x.shape[0], *sizes, *x.shape[-2:]))


def spherical_mask(space: Sequence[int], radius: float = 1.0) -> np.ndarray:
    """[*space] bool: the points within so many half-widths of the centre, which no turn moves out of the array.

    ``x * spherical_mask(x.shape[1:3])[..., None, None]`` masks a field of the plane.

    >>> spherical_mask((3, 3), 0.8).astype(int)
    array([[0, 1, 0],
           [1, 1, 1],
           [0, 1, 0]])
    """
    axes = [(2 * np.arange(n) - (n - 1)) / n for n in space]
    return sum(a**2 for a in np.meshgrid(*axes, indexing="ij")) <= radius**2


def _window(x, window, strides, periodic):
    """x, continued around the edges where it is periodic, and window and strides as ints, known to fit."""
    strides, space = window if strides is None else strides, x.shape[1:-2]
    _positive("window of a pool", window)
    _positive("strides of a pool", strides)
    if min(space) < window:
        raise ValueError(f"a pooling window of {window} does not fit a field with {space} points")
    if periodic:
        _divisible(space, strides)
        beyond = max(0, -(-(window - strides) // 2))
        x = continued(x, [(beyond, beyond)] * len(space), "wrap") if beyond else x
        window = strides + 2 * beyond
    return x, int(window), int(strides)


def _positive(what, value):
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{what} must be an int >= 1, got {value!r}")


def _divisible(space, strides):
    if any(size % strides for size in space):
        raise ValueError(f"periodic pooling by {strides} needs sizes that it divides, got a field with {space} points")


def _wide(x):
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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
