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
      dtype: type of the operands, by default that of x; "matmul" sums products in float32, also for float64.

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
    program = _program(lowering, stencils.tobytes(), stencils.shape, tuple(indices), tuple(strides), tuple(map(tuple, padding)),
                       fold)
    return program(x.astype(dtype or x.dtype), coefficients)


@functools.lru_cache(maxsize=256)
def _program(lowering, data, shape, indices, strides, padding, fold):
    """The function of (x, coefficients) that computes a layer."""
    stencils = np.frombuffer(data).reshape(shape)

    def dense(x, coefficients):
        y = _dense(x, expand(coefficients, stencils), strides, padding)
        return y.reshape(*y.shape[:-1], *coefficients.shape[-2:])

    def matmul(x, coefficients):
        rows = math.prod(coefficients.shape[1:3]), math.prod(coefficients.shape[3:])
        outer_axes = 0 if 4 * rows[0] <= rows[1] else len(strides) - 1  # few inputs (an image): all factors on the input
        return _matmul(x, coefficients, _plan(data, shape, indices, strides, padding, fold, outer_axes))

    def auto(x, coefficients):
        return dense(x, coefficients) if x.dtype == jnp.float64 else chosen(x, coefficients)

    chosen = _on_platform(cpu=matmul, default=dense)
    return jax.jit({"auto": auto, "dense": dense, "matmul": matmul}[lowering])


def _on_platform(cpu, default):
    """Equal functions, of which the platform that the program is compiled for takes one, and its derivative."""

    @jax.custom_vjp
    def call(*arguments):
        return jax.lax.platform_dependent(*arguments, cpu=cpu, default=default)

    def backward(arguments, cotangent):
        cpu_pullback, default_pullback = (lambda a, g, f=f: jax.vjp(f, *a)[1](g) for f in (cpu, default))
        return jax.lax.platform_dependent(arguments, cotangent, cpu=cpu_pullback, default=default_pullback)

    call.defvjp(lambda *arguments: (call(*arguments), arguments), backward)
    return call


def keep_layout(x):
    """Holds a field [batch, *space, channels, components] and its cotangent in the memory layout of "matmul" on a CPU.

    The layers between convolutions call it, so that a stack of them never transposes in memory; elsewhere it does nothing."""
    return _keep_layout(x) if x.ndim >= 4 else x


def _channels_first(x):
    return with_layout_constraint(x, Layout(major_to_minor=(x.ndim - 2, x.ndim - 1, *range(1, x.ndim - 2), 0)))


_keep_layout = jax.jit(_on_platform(cpu=_channels_first, default=lambda x: x))


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


class _Plan:
    """How a bank of stencils is taken apart, stencils[n] = Σ_{b, a} mix[b, a, n] outer[b] ⊗ inner[a], and folded.

    A class q is one matrix product, whose operand stacks the inner factors a, applied to the input part (q + parity of a) mod
    2, and whose result stacks the outer factors b, which go to the output part (q + parity of b) mod 2. Parts 0 and 1 are
    the sums and differences of pairs; an even operator b ⊗ a keeps the part, an odd one swaps it. The block of (b, a) belongs
    to the input part alone, since an operator meets the sum of the coefficients of a pair with the sum of its components, and
    their difference with the difference. Without a fold there is one class and one part, and no parity.
    """

    def __init__(self, stencils, indices, strides, padding, fold, outer_axes):
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
        self.strides, self.padding, self.outer_axes = strides, padding, outer_axes
        self.inner, self.outer = ([functools.reduce(np.multiply.outer, [factors[i] for i in c], np.ones(())) for c in which]
                                  for which in (inner, outer))
        odd_inner, odd_outer = ([sum(odd[i] for i in c) % 2 for c in which] for which in (inner, outer))
        parity = np.add.outer(odd_outer, odd_inner)[..., None] + np.array([sum(i) for i in indices])
        self.fold = fold if 0 not in _parity(factors) and any(odd_inner) and not self.mix[parity % 2 == 1].any() else None
        self.out_parts, self.odd = (2, (odd_inner, odd_outer)) if self.fold else (1, ([0] * len(inner), [0] * len(outer)))

    def classes(self, in_parts, out_parts):
        """For each class the (inner factor, input part) of its operand and the (outer factor, output part) of its result."""
        for q in range(2 if self.fold else 1):
            sides = [[(i, (q + odd) % 2) for i, odd in enumerate(parity)] for parity in self.odd]
            rows, results = ([r for r in side if r[1] < n] for side, n in zip(sides, (in_parts, out_parts), strict=True))
            if rows and results:
                yield rows, results


@functools.lru_cache(maxsize=256)
def _plan(data, shape, *rest):
    return _Plan(np.frombuffer(data).reshape(shape), *rest)


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


@functools.partial(jax.jit, static_argnums=2)
def _matmul(x, coefficients, plan):
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
    parts = tuple(p.reshape(-1, *p.shape[2:]) for p in parts)
    n, channels, components, features, out = kernels[0].shape
    kernels = [k.transpose(0, 3, 4, 1, 2).reshape(n, features * out, channels * components) for k in kernels]
    blocks = tuple(jnp.tensordot(jnp.asarray(plan.mix, k.dtype), k, 1).astype(dtype) for k in kernels)
    y = _pipeline(plan, parts, blocks)
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
def _pipeline(plan, parts, blocks):
    """Parts [rows, *space, batch] and blocks [outer, inner, out rows, rows] -> output parts [out rows, *space', batch]."""
    dim, split = len(plan.strides), plan.outer_axes
    x = [_pad(p, plan.padding, [1] * dim) for p in parts]
    y = [0] * plan.out_parts
    for rows, results in plan.classes(len(parts), plan.out_parts):
        v = _stack(x, plan.inner, rows, 1 + split, plan.strides[split:])
        z = _product([[blocks[part][b, a] for a, part in rows] for b, _ in results], v)
        for zb, (b, part) in zip(z, results, strict=True):
            y[part] += _taps(zb, plan.outer[b], 1, plan.strides[:split])
    return tuple(y)


def _pipeline_forward(plan, parts, blocks):
    return _pipeline(plan, parts, blocks), (parts, blocks)


def _pipeline_backward(plan, residuals, cotangents):
    """The adjoint is a layer of the same form, with turned stencils, on the dilated and padded cotangent of y.

    Its operand serves the gradient of the blocks too: there the outer factors act on x, the inner ones on the cotangent."""
    parts, blocks = residuals
    dtype, dim, split = parts[0].dtype, len(plan.strides), plan.outer_axes
    space = parts[0].shape[1:-1]
    reach = [s - 1 for s in (*plan.outer[0].shape, *plan.inner[0].shape)]
    around = []
    for n, out, r, (low, _), s in zip(space, cotangents[0].shape[1:-1], reach, plan.padding, plan.strides, strict=True):
        around.append((r - low, n + low - (out - 1) * s - 1))
    dy = [_pad(d.astype(dtype), around, plan.strides) for d in cotangents]
    x = [_pad(p, [(r, r) for r in reach[:split]] + [(0, 0)] * (dim - split), [1] * dim) for p in parts]
    inner, outer = [np.flip(s) for s in plan.inner], [np.flip(s) for s in plan.outer]
    dparts, dblocks = [0] * len(parts), [[[None] * len(inner) for _ in outer] for _ in parts]
    for rows, results in plan.classes(len(dy), len(parts)):
        u = _stack(dy, inner, rows, 1 + split, [1] * (dim - split))
        z = _product([[blocks[part][b, a].T for a, _ in rows] for b, part in results], u)
        for zb, (b, part) in zip(z, results, strict=True):
            dparts[part] += _taps(zb, outer[b], 1, [1] * split)
        if split:
            t = _stack(x, plan.outer, results, 1, [1] * split)
            gradient = _dot(_rows(u), _rows(t), ((1,), (1,))).reshape(*u.shape[:2], *t.shape[:2])
            for (k, (a, _)), (j, (b, part)) in itertools.product(enumerate(rows), enumerate(results)):
                dblocks[part][b][a] = gradient[k, :, j]
    if not split:  # the other way round, with few inputs: the inner factors act on x, and the cotangent stays as it is
        x = [_pad(p, plan.padding, [1] * dim) for p in parts]
        for rows, results in plan.classes(len(parts), len(dy)):
            v = _stack(x, plan.inner, rows, 1, plan.strides)
            for b, part in results:
                gradient = _dot(_rows(cotangents[part].astype(dtype)[None]), _rows(v), ((1,), (1,))).reshape(-1, *v.shape[:2])
                for k, (a, source) in enumerate(rows):
                    dblocks[source][b][a] = gradient[:, k]
    zero = jnp.zeros(blocks[0].shape[2:], jnp.float32)
    dblocks = tuple(jnp.stack([jnp.stack([zero if g is None else g for g in row]) for row in part]) for part in dblocks)
    return tuple(d.astype(dtype) for d in dparts), tuple(d.astype(dtype) for d in dblocks)


_pipeline.defvjp(_pipeline_forward, _pipeline_backward)
_barrier = jax.lax.optimization_barrier


def _stack(parts, factors, rows, axis, strides):
    """[len(rows), rows, *space, batch]: each (factor, part) correlated along the axes from ``axis``."""
    return _barrier(jnp.stack([_taps(parts[part], factors[i], axis, strides).astype(parts[0].dtype) for i, part in rows]))


def _product(blocks, v):
    """The matrix of blocks [results][rows] times the stack v, [results, out rows, *space, batch] float32."""
    matrix = _barrier(jnp.concatenate([jnp.concatenate(row, 1) for row in blocks]))  # a transpose left in it makes it slow
    z = _dot(matrix, v.reshape(matrix.shape[1], -1), ((1,), (0,)))
    return z.reshape(len(blocks), -1, *v.shape[2:])


def _rows(stack):
    return stack.reshape(stack.shape[0] * stack.shape[1], -1)


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _pad(x, padding, strides):
    """Pads the axes of space with zeros, after spreading their points by the strides."""
    config = [(0, 0, 0), *((low, high, s - 1) for (low, high), s in zip(padding, strides, strict=True)), (0, 0, 0)]
    return _barrier(jax.lax.pad(x, jnp.zeros((), x.dtype), config))


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
