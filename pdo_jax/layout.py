"""The order of axes that matrix products want on a CPU, and what "matmul" and "fourier" share: array steps in it, and plans."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint


def on_platform(cpu, default, cpu_alone=None):
    """Functions that compute the same; the platform that a program is compiled for takes one, and its derivative.

    Where nothing is differentiated a CPU takes ``cpu_alone``, by default ``cpu``."""

    @jax.custom_vjp
    def call(*arguments):
        return jax.lax.platform_dependent(*arguments, cpu=cpu_alone or cpu, default=default)

    def forward(*arguments):
        return jax.lax.platform_dependent(*arguments, cpu=cpu, default=default), arguments

    def backward(arguments, cotangent):
        cpu_pullback, default_pullback = (lambda a, g, f=f: jax.vjp(f, *a)[1](g) for f in (cpu, default))
        return jax.lax.platform_dependent(arguments, cotangent, cpu=cpu_pullback, default=default_pullback)

    call.defvjp(forward, backward)
    return call


def frozen(array):
    """An array, in float64, as a value that can be hashed."""
    return np.asarray(array, np.float64).tobytes(), array.shape


def thawed(value):
    return np.frombuffer(value[0]).reshape(value[1])


def spanned(rows, columns):
    """[…, rows, n] -> […, rank, n]: an orthonormal basis of the span of the rows, of which only some ``columns`` count."""
    rows = rows * columns
    return np.linalg.svd(rows)[2][..., :np.linalg.matrix_rank(rows).max(), :]


def view(x):
    """A field [batch, *space, channels, components] as [components, channels, *space, batch], which matrix products want.

    All that this library computes on a CPU it computes in this order. XLA moves the transposes through whatever stands between
    two layers, until they cancel, so that a stack of layers never transposes in memory."""
    return x.transpose(x.ndim - 1, x.ndim - 2, *range(1, x.ndim - 2), 0)


def restore(x):
    """The inverse of :func:`view`."""
    return x.transpose(x.ndim - 1, *range(2, x.ndim - 1), 1, 0)


def hold(x):
    """x, in memory and in the order of its axes, where XLA would rather compute it again in whatever it fuses with."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


barrier = jax.lax.optimization_barrier


def few(rows, most=6):
    """The rows in even parts, to stack: XLA fuses a concatenation of few arrays with what makes them, and copies many."""
    size = math.ceil(len(rows) / math.ceil(len(rows) / most)) if rows else 1
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def take(x, index, axis):
    """Static indexing along an axis; a slice where the index is a range, which is cheaper."""
    index = np.asarray(index)
    if (np.diff(index) == 1).all():
        return jax.lax.slice_in_dim(x, int(index[0]), int(index[-1]) + 1, axis=axis)
    return jnp.take(x, index, axis=axis)


def dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def pad(x, padding, strides):
    """Pads the axes of space (those before the last one) with zeros, after spreading their points by the strides."""
    space = [(low, high, s - 1) for (low, high), s in zip(padding, strides, strict=True)]
    config = [(0, 0, 0)] * (x.ndim - 1 - len(space)) + space + [(0, 0, 0)]
    return hold(jax.lax.pad(x, jnp.zeros((), x.dtype), config))


def taps(x, stencil, axis, strides, *ranges):
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
