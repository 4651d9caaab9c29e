"""Ways to run a PDO-eConv: plain arrays in, arrays out.

A layer is given by the coefficients of its operators, for every pair of feature components, and by the stencils of the
derivatives; the sum over n of coefficients[n] · stencils[n] is an ordinary convolution kernel (correlated with the input,
as everywhere in deep learning). All lowerings compute that convolution:

"dense"    expands the kernel and calls XLA's convolution. The reference for the others; best on GPU and TPU.
"matmul"   never expands it. Operators on the input, stacked, meet matrices over the channels; those of high order, of which a
           layer knows few, on the result instead where that is less to keep (module ``matmul``). If the group holds the point
           reflection z, sums and differences of the components C and zC meet only even or only odd operators, which halves
           the products. Matrix products keep their speed in loops and in bfloat16 on a CPU; XLA's convolutions do not.
"fourier"  in the plane, one matrix product for each angular frequency of the group's rotations (module ``fourier``): the work
           grows with the order of the group, that of the others with its square; more passes over memory, so for wide layers.
"auto"     "dense" on GPU and TPU and in float64; on a CPU "fourier" from the sizes in :data:`CROSSOVER` on, else "matmul".

A layer is bilinear in its input and its parameters; a lowering is a class of the layer with three methods, the output and the
two adjoints (module ``bilinear``), so that all of them can be differentiated in both modes to any order.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pdo_jax.lowering import bilinear
from pdo_jax.lowering.compiler import compiler_options
from pdo_jax.lowering.dense import Dense, expand
from pdo_jax.lowering.fourier import Fourier
from pdo_jax.lowering.layout import frozen, is_portable, on_platform, portable, put, take, thawed
from pdo_jax.lowering.matmul import Matmul

__all__ = ["GIVEN", "LOWERINGS", "Fold", "Given", "Turn", "compiler_options", "convolve", "expand", "portable"]
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


class Given:
    """Coefficients that are given as they are: w itself.

    Others are linear functions of w, hashable, with the same two methods; they may have ``kernel(w)`` and its transpose
    ``kernel_transpose(kernel, shape)`` too, if they know the dense kernel better than :func:`expand` of the coefficients."""

    def __call__(self, w: jax.Array, wanted: tuple[int, ...] | None = None) -> jax.Array:
        """[operators, channels, components, features, out components], of those that are wanted: a tuple, or None for all."""
        return w if wanted is None else take(w, wanted, -1)

    def transpose(self, c: jax.Array, shape: tuple[int, ...], wanted: tuple[int, ...] | None = None) -> jax.Array:
        """The transpose, for a w of this shape."""
        if wanted is None:
            return c
        rest = [k for k in range(shape[-1]) if k not in wanted]
        return put([c, jnp.zeros((*shape[:-1], len(rest)), c.dtype)], [wanted, rest], -1)


GIVEN = Given()


@dataclasses.dataclass(frozen=True)
class Layer:
    """All that a lowering needs to know of a layer, hashable; ``shape`` is [*space, channels, components] of its input."""

    coefficients: Any
    frozen_stencils: tuple[Any, ...]
    indices: tuple[tuple[int, ...], ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    fold: Fold | None
    turn: Turn | None
    frozen_span: tuple[Any, ...] | None
    shape: tuple[int, ...]
    weights: tuple[int, ...]
    weight_dtype: Any

    @functools.cached_property
    def points(self) -> np.ndarray:
        """[operators, k, …, k]: the stencils before they are spread by the dilation."""
        return thawed(self.frozen_stencils)

    @functools.cached_property
    def stencils(self) -> np.ndarray:
        spread = np.zeros((len(self.points), *((k - 1) * d + 1 for k, d in zip(
            self.points.shape[1:], self.dilation, strict=True))))
        spread[(slice(None), *(slice(None, None, d) for d in self.dilation))] = self.points
        return spread

    @functools.cached_property
    def span(self) -> np.ndarray | None:
        return self.frozen_span and thawed(self.frozen_span)

    @property
    def size(self) -> tuple[int, ...]:
        return self.stencils.shape[1:]

    @property
    def space(self) -> tuple[int, ...]:
        return self.shape[:-2]

    @property
    def inputs(self) -> tuple[int, ...]:
        """(channels, components)"""
        return self.shape[-2:]

    @functools.cached_property
    def outputs(self) -> tuple[int, ...]:
        """(features, out components)"""
        return jax.eval_shape(self.coefficients, jax.ShapeDtypeStruct(self.weights, self.weight_dtype)).shape[-2:]

    def kernel(self, w: jax.Array) -> jax.Array:
        """[k, …, k, channels · components, features · out components]"""
        if hasattr(self.coefficients, "kernel"):
            return self.coefficients.kernel(w)
        return expand(self.coefficients(w), self.points)

    def pull_back(self, c: jax.Array, wanted: tuple[int, ...] | None = None) -> jax.Array:
        """The adjoint of the coefficients."""
        return self.coefficients.transpose(c, self.weights, wanted).astype(self.weight_dtype)

    def pull_back_kernel(self, kernel: jax.Array) -> jax.Array:
        """The adjoint of :meth:`kernel`."""
        if hasattr(self.coefficients, "kernel"):
            return self.coefficients.kernel_transpose(kernel, self.weights).astype(self.weight_dtype)
        kernel = kernel.reshape(*kernel.shape[:-2], *self.inputs, *self.outputs).astype(jnp.float32)
        space = tuple(range(len(self.strides)))
        stencils = jnp.asarray(np.moveaxis(self.points, 0, -1), kernel.dtype)
        return self.pull_back(jnp.tensordot(stencils, kernel, (space, space)))


def convolve(x: jax.Array, w: jax.Array, stencils: np.ndarray, indices: Sequence[tuple[int, ...]], *, strides: Sequence[int],
             padding: Sequence[tuple[int, int]], dilation: Sequence[int] | None = None, coefficients: Any = None,
             lowering: str = "auto", fold: Fold | None = None, turn: Turn | None = None, span: np.ndarray | None = None,
             dtype: DTypeLike | None = None) -> jax.Array:
    """Applies a PDO-eConv.

    y[b, X, o, A] = Σ_n Σ_{i, C} coefficients[n, i, C, o, A] Σ_K stencils[n, K] x[b, strides X + dilation K - padding, i, C].

    Args:
      x: [batch, *space, channels, components].
      w: [operators, channels, components, features, out components], or what ``coefficients`` makes these of.
      stencils: numpy [operators, k, …, k], one axis for each of space.
      indices: the multi-index of each operator.
      strides: an int for each axis of space.
      padding: (before, after) zeros for each axis of space.
      dilation: points from one of a stencil to the next, an int for each axis, by default 1.
      coefficients: what makes the coefficients of w, as :class:`Given` (the default) does, and is hashable.
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
    span = None if span is None else frozen(span)
    layer = Layer(coefficients or GIVEN, frozen(stencils), tuple(indices), tuple(strides), tuple(map(tuple, padding)),
                  tuple(dilation or (1,) * len(strides)), fold, turn, span, x.shape[1:], w.shape, w.dtype)
    if any(n + sum(p) < k for n, p, k in zip(layer.space, layer.padding, layer.size, strict=True)):
        size = layer.size[0] if len(set(layer.size)) == 1 else layer.size
        raise ValueError(f"a kernel of size {size} does not fit an input of shape {layer.space} padded by {layer.padding}")
    check_lowering(lowering, turn)
    x = x.astype(dtype or x.dtype)
    if is_portable():
        return Dense(layer).output(x, w)
    return bilinear.apply(_form(lowering, layer, x.dtype), x, w)


def check_lowering(lowering: str, turn: Turn | None) -> None:
    """ValueError for an unknown lowering, and for "fourier" without a ``turn``."""
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering must be one of {LOWERINGS}, got {lowering!r}")
    if lowering == "fourier" and not turn:
        raise ValueError('lowering "fourier" needs an orbit layer of a group of the plane; use "matmul", "dense" or "auto"')


@functools.lru_cache(maxsize=512)
def _form(name, layer, dtype):
    """The three functions of a lowering."""
    if name != "auto":
        return _compiled(_way(name, layer))
    alone, differentiated = on_cpu(math.sqrt(math.prod(layer.inputs) * math.prod(layer.outputs)), dtype, layer.turn)
    default, cpu, alone = (_way(name, layer) for name in ("dense", differentiated, alone))
    if cpu is default:
        return _compiled(default)
    output = jax.jit(on_platform(cpu.output, default.output))
    return bilinear.Form(jax.jit(on_platform(cpu.input, default.input)), jax.jit(on_platform(cpu.weight, default.weight)),
                         output, output if alone is cpu else jax.jit(on_platform(alone.output, default.output)))


@functools.lru_cache(maxsize=512)
def _way(name, layer):
    if name == "fourier" and layer.turn.source is None:
        name = "matmul"
    return {"dense": Dense, "matmul": Matmul, "fourier": Fourier}[name](layer)


def _compiled(way):
    output = jax.jit(way.output)
    return bilinear.Form(jax.jit(way.input), jax.jit(way.weight), output, output)


def on_cpu(size: float, dtype: np.dtype, turn: Turn | None) -> tuple[str, str]:
    """What "auto" takes on a CPU for so many channels · components: forward alone, and where it is differentiated."""
    if dtype.itemsize not in CROSSOVER:
        return "dense", "dense"
    return tuple("fourier" if size >= least and turn and turn.source else "matmul" for least in CROSSOVER[dtype.itemsize])
