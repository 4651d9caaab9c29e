"""The order of axes that matrix products want on a CPU, and what the lowerings share: array steps in it, and plans."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Programs traced inside are made of standard operations alone: what an exporter or a converter can read.

    Every layer is then an ordinary convolution ("dense"), whatever its ``lowering``; no program chooses by platform or fixes
    the layout of an array in memory. A function that ``jax.jit`` has traced before is not traced again: give a fresh one.

    >>> import jax, pdo_jax as pdo
    >>> layer = pdo.LiftingConv(2, pdo.groups.cyclic(4))
    >>> variables = layer.init(jax.random.key(0), x := jax.numpy.ones([1, 8, 8, 1]))
    >>> with portable():
    ...     program = jax.make_jaxpr(layer.apply)(variables, x)
    >>> "pdo_bilinear" in str(program)
    False
    """
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def is_portable() -> bool:
    return _PORTABLE.get()


def on_platform(cpu: Callable[..., Any], default: Callable[..., Any]) -> Callable[..., Any]:
    """What computes ``cpu`` where a program is compiled for a CPU; elsewhere, and in :func:`portable`, ``default``."""
    return default if is_portable() else functools.partial(jax.lax.platform_dependent, cpu=cpu, default=default)


def frozen(array: np.ndarray) -> tuple[Any, ...]:
    """An array, in float64, as a value that can be hashed."""
    return np.asarray(array, np.float64).tobytes(), array.shape


def thawed(value: tuple[Any, ...]) -> np.ndarray:
    return np.frombuffer(value[0]).reshape(value[1])


def spanned(rows: np.ndarray, columns: np.ndarray | Sequence[bool]) -> np.ndarray:
    """[…, rows, n] -> […, rank, n]: an orthonormal basis of the span of the rows, of which only some ``columns`` count."""
    rows = rows * columns
    return np.linalg.svd(rows)[2][..., :np.linalg.matrix_rank(rows).max(), :]


def view(x: jax.Array) -> jax.Array:
    """A field [batch, *space, channels, components] as [components, channels, *space, batch], which matrix products want.

    All that this library computes on a CPU it computes in this order. XLA moves the transposes through whatever stands between
    two layers, until they cancel, so that a stack of layers never transposes in memory."""
    return x.transpose(x.ndim - 1, x.ndim - 2, *range(1, x.ndim - 2), 0)


def restore(x: jax.Array) -> jax.Array:
    """The inverse of :func:`view`."""
    return x.transpose(x.ndim - 1, *range(2, x.ndim - 1), 1, 0)


def hold(x: jax.Array) -> jax.Array:
    """x, in memory and in the order of its axes, where XLA would rather compute it again in whatever it fuses with."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def arranged(x: jax.Array) -> jax.Array:
    """A field, in memory in the order of :func:`view` where a program is compiled for a CPU; so is its cotangent."""
    return on_platform(lambda x: restore(hold(view(x))), lambda x: x)(x)


barrier: Callable[[Any], Any] = jax.lax.optimization_barrier


def few(rows: Sequence[Any], most: int = 6) -> list[Any]:
    """The rows in even parts, to stack: XLA fuses a concatenation of few arrays with what makes them, and copies many."""
    size = math.ceil(len(rows) / math.ceil(len(rows) / most)) if rows else 1
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def take(x: jax.Array, index: Sequence[int], axis: int) -> jax.Array:
    """Static indexing along an axis; a slice where the index is a range, which is cheaper."""
    index = np.asarray(index)
    if (np.diff(index) == 1).all():
        return jax.lax.slice_in_dim(x, int(index[0]), int(index[-1]) + 1, axis=axis)
    return jnp.take(x, index, axis=axis)


def put(parts: Sequence[jax.Array], indices: Sequence[Sequence[int]], axis: int) -> jax.Array:
    """The transpose of taking ``indices``, one tuple for each part, where together they are all of the axis."""
    order = np.argsort(np.concatenate([np.asarray(index) for index in indices]))
    return take(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis), order, axis)


def merge(x: jax.Array, axis: int = 0) -> jax.Array:
    """Two neighbouring axes as one. Space and batch are never merged: over a mesh the batch may be sharded."""
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2:])


def split(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """An axis as two, of which the first has so many entries."""
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1:])


def dot(a: jax.Array, b: jax.Array, contract: Any, batch: Any = ((), ())) -> jax.Array:
    """A matrix product that sums in float32."""
    return jax.lax.dot_general(a, b, (contract, batch), preferred_element_type=jnp.float32, **replicated(a, contract[0]))


def replicated(x: jax.Array, axes: Sequence[int]) -> dict[str, Any]:
    """The option of a product that sums over some axes of x: over a mesh of explicit axes that these are sharded over, its
    result is whole on every device."""
    sharding = jax.typeof(x).sharding
    if all(sharding.spec[axis] is None for axis in axes):
        return {}
    return {"out_sharding": jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())}


def pad(x: jax.Array, padding: Sequence[tuple[int, int]], strides: Sequence[int]) -> jax.Array:
    """Pads the axes of space (those before the last one) with zeros, after spreading their points by the strides."""
    space = [(low, high, s - 1) for (low, high), s in zip(padding, strides, strict=True)]
    config = [(0, 0, 0)] * (x.ndim - 1 - len(space)) + space + [(0, 0, 0)]
    return hold(jax.lax.pad(x, jnp.zeros((), x.dtype), config))


def extended(x: jax.Array, axis: int, low: int, high: int, mode: str) -> jax.Array:
    """So many more points before and behind an axis, taken from it as by ``numpy.pad``: "wrap", "edge" or "reflect"."""
    source = np.pad(np.arange(x.shape[axis]), (low, high), mode)
    more = [jax.lax.slice_in_dim(x, k, k + 1, axis=axis) for k in (*source[:low], *source[len(source) - high:])]
    return jnp.concatenate([*more[:low], x, *more[low:]], axis)


def continued(x: jax.Array, padding: Sequence[tuple[int, int]], mode: str) -> jax.Array:
    """A field, :func:`extended` along each axis of space; its cotangent, a sum of slices, is made once and held."""
    def more(x, first):
        for axis, (low, high) in enumerate(padding, first):
            x = extended(x, axis, low, high, mode)
        return x

    return on_platform(lambda x: restore(more(hold(view(x)), 2)), lambda x: more(x, 1))(x)


def taps(x: jax.Array, stencil: np.ndarray, axis: int, strides: Sequence[int], *ranges: range) -> jax.Array:
    """Correlates x, of its first axes only the ``ranges``, with a stencil along the axes that start at ``axis``, in float32;
    sums points of equal weight first."""
    x, space = jax.lax.convert_element_type(x, jnp.float32), slice(axis, axis + stencil.ndim)
    low, high, step = np.zeros(x.ndim, int), np.array(x.shape), np.ones(x.ndim, int)
    for d, r in enumerate(ranges):
        low[d], high[d], step[d] = r.start, r.stop, r.step
    step[space] = strides
    high[space] = (high[space] - stencil.shape) // strides * strides + 1
    sums = {}
    for k in np.argwhere(stencil):
        offset = np.zeros(x.ndim, int)
        offset[space] = k
        v = jax.lax.slice(x, low + offset, high + offset, step)
        weight = stencil[tuple(k)]
        size = round(abs(weight), 12)
        if size in sums:
            total, sign = sums[size]
            sums[size] = (jax.lax.add if sign == np.sign(weight) else jax.lax.sub)(total, v), sign
        else:
            sums[size] = v, np.sign(weight)
    weighted = [(v, np.float32(sign * size)) for size, (v, sign) in sums.items()]
    return functools.reduce(jax.lax.add, [v if w == 1 else jax.lax.mul(v, w) for v, w in weighted])


def around(sizes: Sequence[int], space: Sequence[int], outputs: Sequence[int], padding: Sequence[tuple[int, int]],
           strides: Sequence[int]) -> list[tuple[int, int]]:
    """The (before, after) zeros of the adjoint of a correlation with a kernel of so many points along each axis."""
    return [(k - 1 - low, n + low - (out - 1) * s - 1)
            for k, n, out, (low, _), s in zip(sizes, space, outputs, padding, strides, strict=True)]
