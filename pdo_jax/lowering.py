"""Ways to run a PDO-eConv: plain arrays in, arrays out.

A layer is given by the coefficients of its operators, for every pair of feature components, and by the stencils of the
derivatives; the sum over n of coefficients[n] · stencils[n] is an ordinary convolution kernel (correlated with the input,
as everywhere in deep learning). All lowerings compute that convolution:

"dense"    expands the kernel and calls XLA's convolution. The reference for the others; best on GPU and TPU.
"matmul"   never expands it. Operators on the input, stacked, meet matrices over the channels; those of high order, of which a
           layer knows few, on the result instead where that is less to keep (:mod:`pdo_jax.matmul`). If the group holds the
           point reflection z, sums and differences of the components C and zC meet only even or only odd operators, which
           halves the products. Matrix products keep their speed in loops and in bfloat16 on a CPU; XLA's convolutions there
           do not.
"fourier"  in the plane, one matrix product for each angular frequency of the group's rotations (:mod:`pdo_jax.fourier`): the
           work grows with the order of the group, that of the others with its square; more passes over memory, so for wide
           layers.
"auto"     "dense" on GPU and TPU and in float64; on a CPU "fourier" from the sizes in :data:`CROSSOVER` on, else "matmul".
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pdo_jax import fourier, matmul
from pdo_jax.layout import frozen, on_platform, take, thawed

__all__ = ["LOWERINGS", "Fold", "Turn", "convolve", "expand"]
LOWERINGS = ("auto", "dense", "matmul", "fourier")
CROSSOVER = {2: (700, 560), 4: (370, 256)}
"""Bytes of a number -> channels · components, geometric mean of input and output, from which "fourier" is faster on a CPU:
forward alone, and forward and backward.

Measured on 2 cores with AVX-512 and AMX, for maps of 8² and 16² points and N = 8, 12 and 24, of the second also 16. From 250
to 360 in float32, and from 480 to 640 in bfloat16, map and group decide which of the two is faster, by about a tenth."""


class Fold(NamedTuple):
    """Pairs of components under the point reflection z: ``second[k] = z first[k]``.

    ``source`` holds the (first, second) of the input, or is None where z leaves it unchanged (an image); ``target`` those
    of the output.
    """

    source: tuple[tuple[int, ...], tuple[int, ...]] | None
    target: tuple[tuple[int, ...], tuple[int, ...]]


class Turn(NamedTuple):
    """The orbits ``(c, rc, r²c, …)`` of the components under the rotation r of the plane by 2π / length, axis 0 towards axis 1.

    ``source`` holds those of the input, or is None where r leaves it unchanged (an image; "fourier" then runs as "matmul"),
    ``target`` those of the output.
    """

    source: tuple[tuple[int, ...], ...] | None
    target: tuple[tuple[int, ...], ...]


def given(coefficients, wanted=None):
    """The coefficients [operators, channels, components, features, out components] of the out components that are wanted."""
    return coefficients if wanted is None else take(coefficients, wanted, -1)


def convolve(x, w, stencils, indices, *, strides, padding, coefficients=given, kernel=None, lowering="auto", fold=None,
             turn=None, span=None, dtype=None):
    """Applies a PDO-eConv.

    y[b, X, o, A] = Σ_n Σ_{i, C} coefficients[n, i, C, o, A] Σ_K stencils[n, K] x[b, strides · X + K - padding, i, C].

    Args:
      x: [batch, *space, channels, components].
      w: [operators, channels, components, features, out components], or what ``coefficients`` makes these of.
      stencils: numpy [operators, k, …, k], one axis for each of space.
      indices: the multi-index of each operator.
      strides: an int for each axis of space.
      padding: (before, after) zeros for each axis of space.
      coefficients: a hashable function of w and of the out components that are wanted (a tuple, or None for all).
      kernel: a hashable function of w, the dense kernel as :func:`expand` would make it of the coefficients.
      lowering: one of :data:`LOWERINGS`.
      fold: pairs of components, if the layer is equivariant to the point reflection.
      turn: orbits of components, if the layer is equivariant to a rotation of the plane.
      span: numpy [out components, rows, operators]; the coefficients of each output component lie in the span of its rows,
        by default all operators.
      dtype: type of the operands, by default that of x; all but "dense" sum products in float32, also for float64.

    Returns:
      [batch, *space', features, out components], of type dtype.

    Raises:
      ValueError: a kernel larger than the padded input, an unknown lowering, or "fourier" for a layer without a ``turn``.
    """
    check_fit(stencils.shape[1], x.shape[1:-2], padding)
    check_lowering(lowering, turn)
    program = _program(lowering, coefficients, kernel, frozen(stencils), tuple(indices), tuple(strides),
                       tuple(map(tuple, padding)), fold, turn, None if span is None else frozen(span))
    return program(x.astype(dtype or x.dtype), w)


def check_lowering(lowering, turn):
    """ValueError for an unknown lowering, and for "fourier" without a ``turn``."""
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering must be one of {LOWERINGS}, got {lowering!r}")
    if lowering == "fourier" and not turn:
        raise ValueError('lowering "fourier" needs an orbit layer of a group of the plane; use "matmul", "dense" or "auto"')


def check_fit(size, space, padding):
    """ValueError for a kernel that is larger than the padded input."""
    if any(s + sum(p) < size for s, p in zip(space, padding, strict=True)):
        raise ValueError(f"a kernel of size {size} does not fit an input of shape {space} padded by {padding}")


@functools.lru_cache(maxsize=256)
def _program(lowering, coefficients, kernel, stencils, indices, strides, padding, fold, turn, span):
    """The compiled function of (x, w) that computes a layer."""

    def by_convolution(x, w):
        y = _dense(x, kernel(w) if kernel else expand(coefficients(w), thawed(stencils)), strides, padding)
        return y.reshape(*y.shape[:-1], *outputs(w))

    def by_matmul(x, w):
        plan = matmul.plan(stencils, indices, strides, padding, fold, span)
        return matmul.convolve(x, coefficients(w, plan.fold and plan.fold.target[0]), plan)

    def by_fourier(x, w):
        if turn.source is None:
            return by_matmul(x, w)
        plan = fourier.plan(stencils, indices, strides, padding, turn, span)
        return fourier.convolve(x, coefficients(w, tuple(orbit[0] for orbit in turn.target)), plan)

    def outputs(w):
        return _outputs(coefficients, w.shape, w.dtype)

    def auto(x, w):
        size = math.sqrt(math.prod(x.shape[-2:]) * math.prod(outputs(w)))
        alone, differentiated = (ways[name] for name in on_cpu(size, x.dtype, turn))
        return alone(x, w) if alone is by_convolution else on_platform(differentiated, by_convolution, alone)(x, w)

    ways = {"dense": by_convolution, "matmul": by_matmul, "fourier": by_fourier}
    return jax.jit(ways.get(lowering, auto))


@functools.lru_cache(maxsize=256)
def _outputs(coefficients, shape, dtype):
    return jax.eval_shape(coefficients, jax.ShapeDtypeStruct(shape, dtype)).shape[-2:]


def on_cpu(size, dtype, turn):
    """What "auto" takes on a CPU for so many channels · components: forward alone, and where it is differentiated."""
    if dtype.itemsize not in CROSSOVER:
        return "dense", "dense"
    return tuple("fourier" if size >= least and turn and turn.source else "matmul" for least in CROSSOVER[dtype.itemsize])


def expand(coefficients, stencils):
    """The dense kernel [k, …, k, channels · components, features · out components] of a layer."""
    kernel = jnp.tensordot(jnp.asarray(stencils, coefficients.dtype), coefficients, ((0,), (0,)))
    *size, channels, components, features, out = kernel.shape
    return kernel.reshape(*size, channels * components, features * out)


def _dense(x, kernel, strides, padding):
    dim = len(strides)
    last = (0, dim + 1, *range(1, dim + 1))  # channels last
    numbers = jax.lax.ConvDimensionNumbers(last, (dim + 1, dim, *range(dim)), last)
    return jax.lax.conv_general_dilated(x.reshape(*x.shape[:-2], -1), kernel.astype(x.dtype), strides, padding,
                                        dimension_numbers=numbers)
