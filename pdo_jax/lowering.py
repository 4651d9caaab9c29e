"""Ways to run a PDO-eConv: plain arrays in, arrays out.

A layer is given by the coefficients of its operators, for every pair of feature components, and by the stencils of the
derivatives; the sum over n of coefficients[n] · stencils[n] is an ordinary convolution kernel (correlated with the input,
as everywhere in deep learning). All lowerings compute that convolution:

"dense"   expands the kernel and calls XLA's convolution. The reference for the others; best on GPU and TPU.
"matmul"  never expands it. A stencil is an inner factor along the last axis times an outer one along the others: inner
          factors on the input, one matrix product over the channels, outer factors on its output, in the layout
          [channels, *space, batch]. If the group holds the point reflection z, sums and differences of the components C
          and zC meet only even or only odd operators, which halves the product. Matrix products keep their speed in
          loops and in bfloat16 on a CPU; XLA's convolutions there do not.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

LOWERINGS = ("auto", "dense", "matmul")


class Fold(NamedTuple):
    """Pairs of components under the point reflection z: ``second[k] = z first[k]``.

    ``source`` holds the (first, second) of the input, or is None where z leaves it unchanged (an image); ``target`` those
    of the output.
    """

    source: tuple[tuple[int, ...], tuple[int, ...]] | None
    target: tuple[tuple[int, ...], tuple[int, ...]]


def convolve(x, coefficients, stencils, indices, *, strides, padding, lowering="auto", fold=None, dtype=None):
    """Applies a PDO-eConv.

    y[b, X, o, A] = Σ_n Σ_{i, C} coefficients[n, i, C, o, A] Σ_K stencils[n, K] x[b, strides · X + K - padding, i, C].

    Args:
      x: [batch, *space, channels, components].
      coefficients: [operators, channels, components, features, out components].
      stencils: numpy [operators, k, …, k], one axis for each of space.
      indices: the multi-index of each operator.
      strides: an int for each axis of space.
      padding: (before, after) zeros for each axis of space.
      lowering: one of :data:`LOWERINGS`.
      fold: pairs of components, if the layer is equivariant to the point reflection.
      dtype: type of the operands, by default that of x; products are summed in float32.

    Returns:
      [batch, *space', features, out components], of type dtype.

    Raises:
      ValueError: a kernel larger than the padded input, or an unknown lowering.
    """
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering must be one of {LOWERINGS}, got {lowering!r}")
    size, space = stencils.shape[1], x.shape[1:-2]
    if any(s + sum(p) < size for s, p in zip(space, padding, strict=True)):
        raise ValueError(f"a kernel of size {size} does not fit an input of shape {space} padded by {padding}")
    x = x.astype(dtype or x.dtype)
    if lowering == "auto":
        lowering = "matmul" if jax.default_backend() == "cpu" else "dense"
    if lowering == "dense":
        return _dense(x, expand(coefficients, stencils), strides, padding).reshape(
            *_output_shape(x, size, strides, padding), *coefficients.shape[-2:])
    rows = math.prod(coefficients.shape[1:3]), math.prod(coefficients.shape[3:])
    outer_axes = 0 if 4 * rows[0] <= rows[1] else len(strides) - 1  # few inputs (an image): all factors on the input
    plan = _plan(stencils.tobytes(), stencils.shape, tuple(indices), tuple(strides), fold, outer_axes)
    return _matmul(x, coefficients, plan, tuple(padding))


@jax.custom_vjp
def keep_layout(x):
    """Holds a field [batch, *space, channels, components] and its cotangent in the memory layout of "matmul" on a CPU.

    The layers between convolutions call it, so that a stack of them never transposes in memory; elsewhere it does nothing."""
    if jax.default_backend() != "cpu" or x.ndim < 4:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=(x.ndim - 2, x.ndim - 1, *range(1, x.ndim - 2), 0)))


keep_layout.defvjp(lambda x: (keep_layout(x), None), lambda _, g: (keep_layout(g),))


def expand(coefficients, stencils):
    """The dense kernel [k, …, k, channels · components, features · out components] of a layer."""
    kernel = jnp.tensordot(jnp.asarray(stencils, coefficients.dtype), coefficients, ((0,), (0,)))
    *size, channels, components, features, out = kernel.shape
    return kernel.reshape(*size, channels * components, features * out)


def _output_shape(x, size, strides, padding):
    return (len(x), *((n + sum(p) - size) // s + 1 for n, p, s in zip(x.shape[1:-2], padding, strides, strict=True)))


def _dense(x, kernel, strides, padding):
    dim = len(strides)
    last = (0, dim + 1, *range(1, dim + 1))  # channels last
    numbers = jax.lax.ConvDimensionNumbers(last, (dim + 1, dim, *range(dim)), last)
    return jax.lax.conv_general_dilated(x.reshape(*x.shape[:-2], -1), kernel.astype(x.dtype), strides, padding,
                                        dimension_numbers=numbers)


class _Plan:
    """How a bank of stencils is taken apart, stencils[n] = Σ_{b, a} mix[n, b, a] outer[b] ⊗ inner[a], and folded.

    A class q is one matrix product: inner factor a applied to the input part ``part_in[q][a]`` gives row a of its
    operand, and outer factor b takes its row b to the output part ``part_out[q][b]``. Without a fold there is one class
    and one part. With one, parts 0 and 1 are the sums and differences of pairs: an operator b ⊗ a that is even keeps the
    part, an odd one swaps it.
    """

    def __init__(self, stencils, indices, strides, fold, outer_axes):
        dim = stencils.ndim - 1
        factors, mix = _take_apart(stencils, indices)
        odd = [int(p < 0) for p in _parity(factors)]
        outer = sorted(itertools.product(range(len(factors)), repeat=outer_axes), key=sum)
        inner = sorted(itertools.product(range(len(factors)), repeat=dim - outer_axes), key=sum)
        mix = np.array([[mix[(slice(None), *b, *a)] for a in inner] for b in outer])  # [outer, inner, operators]
        used = np.abs(mix).max(2) > 0
        outer = [b for b, u in zip(outer, used.any(1), strict=True) if u]
        inner = [a for a, u in zip(inner, used.any(0), strict=True) if u]
        self.mix = mix[used.any(1)][:, used.any(0)]
        self.strides, self.outer_axes = strides, outer_axes
        self.inner, self.outer = ([functools.reduce(np.multiply.outer, [factors[i] for i in c], np.ones(())) for c in which]
                                  for which in (inner, outer))
        odd_inner, odd_outer = ([sum(odd[i] for i in c) % 2 for c in which] for which in (inner, outer))
        self.fold = fold if 0 not in _parity(factors) and any(odd_inner) else None
        if self.fold is None:
            self.parts, self.classes = 1, [([(a, 0) for a in range(len(inner))], [0] * len(outer))]
        else:
            self.parts, image = 2, self.fold.source is None
            self.classes = []
            for q in (0, 1):
                rows = [(a, (q + odd) % 2) for a, odd in enumerate(odd_inner)]
                self.classes.append(([r for r in rows if not (image and r[1])], [(q + odd) % 2 for odd in odd_outer]))


@functools.lru_cache(maxsize=256)
def _plan(data, shape, indices, strides, fold, outer_axes):
    return _Plan(np.frombuffer(data).reshape(shape), indices, strides, fold, outer_axes)


def _take_apart(stencils, indices):
    """1-D factors [m, k] and mix [operators, m, …, m] such that stencils = Σ mix · factor ⊗ … ⊗ factor.

    Where every stencil is the tensor product of 1-D ones, one for each power, those are the factors and mix is sparse;
    otherwise the factors are the sums and differences of the points at equal distance from the centre."""
    dim, size = stencils.ndim - 1, stencils.shape[1]
    most = max(map(sum, indices))
    wanted = [(0,) * (dim - 1) + (d,) for d in range(most + 1)]
    if all(w in indices for w in wanted):
        factors = np.stack([stencils[indices.index(w)].reshape(-1, size).sum(0) for w in wanted])
        product = [functools.reduce(np.multiply.outer, [factors[d] for d in alpha]) for alpha in indices]
        if np.allclose(stencils, product, atol=1e-12) and 0 not in _parity(factors):
            mix = np.zeros((len(indices), *[most + 1] * dim))
            mix[(range(len(indices)), *zip(*indices, strict=True))] = 1
            return factors, mix
    middle = size // 2
    factors = np.zeros((size, size))
    for d in range(size):
        reach = (d + 1) // 2
        factors[d, middle + reach], factors[d, middle - reach] = 1, (-1) ** d
    mix = stencils
    for _ in range(dim):
        mix = np.moveaxis(np.tensordot(mix, np.linalg.inv(factors), ((1,), (0,))), -1, dim)
    return factors, np.where(np.abs(mix) < 1e-12, 0, mix)


def _parity(factors):
    """1 for each even row, -1 for each odd one, 0 for neither."""
    return [next((s for s in (1, -1) if np.allclose(f, s * f[::-1], atol=1e-12)), 0) for f in factors]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _matmul(x, coefficients, plan, padding):
    dtype, dim = x.dtype, len(plan.strides)
    batch_last = [dim + 1, dim + 2, *range(1, dim + 1), 0]
    x, c = keep_layout(x).transpose(batch_last), coefficients  # [channels, components, *space, batch]
    if plan.fold is None:
        parts, kernels = [x], [c]
    else:
        (first, second), c = plan.fold.target, c[..., np.array(plan.fold.target[0])]
        if plan.fold.source is None:
            parts, kernels = [x], [c]
        else:
            source = [np.array(s) for s in plan.fold.source]
            x1, x2 = (_take(x, s, 1) for s in source)
            c1, c2 = (_take(c, s, 2) for s in source)
            parts, kernels = [x1 + x2, x1 - x2], [(c1 + c2) / 2, (c1 - c2) / 2]
    parts = [jnp.pad(p.reshape(-1, *p.shape[2:]), ((0, 0), *padding, (0, 0))) for p in parts]
    n, channels, components, features, out = kernels[0].shape
    kernels = [k.transpose(0, 3, 4, 1, 2).reshape(n, features * out, channels * components) for k in kernels]
    weights = []
    for rows, _ in plan.classes:
        chosen = [jnp.tensordot(jnp.asarray(plan.mix[:, a], c.dtype), kernels[part], 1) for a, part in rows]
        weights.append(jnp.stack(chosen, 2).astype(dtype))  # [outer, out rows, inner, in rows]
    y = _pipeline(plan, tuple(parts), tuple(weights))
    y = [p.reshape(features, out, *p.shape[1:]) for p in y]
    if plan.fold is not None:
        order = np.argsort([*first, *second])
        y = _take(jnp.concatenate([y[0] + y[1], y[0] - y[1]], 1), order, 1)
    else:
        y = y[0]
    return keep_layout(y.astype(dtype).transpose(dim + 2, *range(2, dim + 2), 0, 1))


def _take(x, index, axis):
    """Static indexing along an axis; a slice where the index is a range, which is cheaper."""
    index = np.asarray(index)
    if (np.diff(index) == 1).all():
        return jax.lax.slice_in_dim(x, int(index[0]), int(index[-1]) + 1, axis=axis)
    return jnp.take(x, index, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pipeline(plan, parts, weights):
    """[rows, *space, batch] -> [out rows, *space', batch] for each part; rows are channels and components."""
    y = [0] * plan.parts
    for (rows, targets), weight in zip(plan.classes, weights, strict=True):
        v = _inner(plan, parts, rows)
        z = _dot(weight.reshape(-1, weight.shape[2] * weight.shape[3]), v.reshape(-1, math.prod(v.shape[2:])), ((1,), (0,)))
        z = z.reshape(*weight.shape[:2], *v.shape[2:])
        for b, (target, stencil) in enumerate(zip(targets, plan.outer, strict=True)):
            y[target] += _taps(z[b], stencil, 1, plan.strides[:plan.outer_axes])
    return tuple(y)


def _inner(plan, parts, rows):
    """The inner factors on the last axes of space: [inner, rows, *space, batch]."""
    strides = plan.strides[plan.outer_axes:]
    return _barrier(jnp.stack([_taps(parts[part], plan.inner[a], 1 + plan.outer_axes, strides).astype(parts[0].dtype)
                               for a, part in rows]))


def _pipeline_forward(plan, parts, weights):
    return _pipeline(plan, parts, weights), (parts, weights)


def _pipeline_backward(plan, residuals, dy):
    parts, weights = residuals
    dtype, split = parts[0].dtype, 1 + plan.outer_axes
    dparts, dweights = [0] * len(parts), []
    dy = [_spread(d.astype(dtype), plan.outer[0].shape, plan.strides, parts[0].shape) for d in dy]
    for (rows, targets), weight in zip(plan.classes, weights, strict=True):
        v = _inner(plan, parts, rows)
        dz = _barrier(jnp.stack([_taps(dy[t], np.flip(s), 1, [1] * s.ndim).astype(dtype)
                                 for t, s in zip(targets, plan.outer, strict=True)]))
        columns = math.prod(v.shape[2:])
        dz2, v2 = dz.reshape(-1, columns), v.reshape(-1, columns)
        dweights.append(_dot(dz2, v2, ((1,), (1,))).reshape(weight.shape).astype(weight.dtype))
        transposed = _barrier(weight.transpose(2, 3, 0, 1))  # a transpose left in the product makes it slow
        dv = _dot(transposed.reshape(v2.shape[0], -1), dz2, ((1,), (0,))).reshape(v.shape)
        sums = [0] * len(parts)
        for g, (a, part) in zip(dv, rows, strict=True):
            sums[part] += _taps_transposed(g, plan.inner[a], split, plan.strides[plan.outer_axes:], parts[0].shape[split:-1])
        dparts = [d + _barrier(s) for d, s in zip(dparts, sums, strict=True)]  # small fusions: large ones are not fused at all
    return tuple(d.astype(dtype) for d in dparts), tuple(dweights)


_pipeline.defvjp(_pipeline_forward, _pipeline_backward)
_barrier = jax.lax.optimization_barrier


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _taps(x, stencil, axis, strides):
    """Correlates x with a stencil along the axes that start at ``axis``, in float32."""
    total = 0
    for k, weight in np.ndenumerate(stencil):
        if weight:
            v = x
            for i, (offset, s) in enumerate(zip(k, strides, strict=True), axis):
                v = jax.lax.slice_in_dim(v, offset, offset + (x.shape[i] - stencil.shape[i - axis]) // s * s + 1, s, i)
            total = total + np.float32(weight) * v.astype(jnp.float32)
    return total


def _spread(g, size, strides, shape):
    """Dilates and pads the first axes of space, so that correlating with a flipped stencil transposes :func:`_taps`."""
    config = [(0, 0, 0)] * g.ndim
    for i, (k, s) in enumerate(zip(size, strides, strict=False), 1):
        config[i] = (k - 1, shape[i] - (g.shape[i] - 1) * s - 1, s - 1)
    return _barrier(jax.lax.pad(g, jnp.zeros((), g.dtype), config))


def _taps_transposed(g, stencil, axis, strides, sizes):
    """The transpose of :func:`_taps`: g scattered back to ``sizes`` points along those axes."""
    total = 0
    for k, weight in np.ndenumerate(stencil):
        if weight:
            config = [(0, 0, 0)] * g.ndim
            for i, (offset, s, size) in enumerate(zip(k, strides, sizes, strict=True), axis):
                config[i] = (offset, size - offset - (g.shape[i] - 1) * s - 1, s - 1)
            total = total + jax.lax.pad(np.float32(weight) * g.astype(jnp.float32), np.float32(0), config)
    return total
