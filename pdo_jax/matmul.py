"""The "matmul" lowering, in any dimension: a PDO-eConv as matrix products over the channels.

The coefficients of an output component A lie in the span of the base polynomials q_jA that A turned, of which there are fewer
than operators (on 5×5 nine, where all operators up to their order are fifteen; those up to second order are the same for all
A). So an operator is applied to the input, ∂^n x_C, or those of one order as a sum to the output:

    y_A = Σ_C Σ_n c_n(A, C) ∂^n x_C = Σ_j q_jA(∇) Σ_C δ_j(A, C) x_C,      c_n(A, C) = Σ_j q_jA[n] δ_j(A, C),

and the gradients need only the q_jA, on the cotangent g: with u_jA = q_jA(∇)* g_A,

    dx_C = Σ_jA δ_j(A, C) u_jA,      dδ_j(A, C) = ⟨u_jA, x_C⟩.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pdo_jax.layout import barrier, dot, few, hold, pad, restore, spanned, take, taps, thawed, view


class Row(NamedTuple):
    """A polynomial for each output component, or one for all.

    ``weights`` [components or 1, operators] are its coefficients, ``stencils`` [components or 1, k, …, k] its stencils; an odd
    one swaps sums and differences."""

    odd: int
    weights: np.ndarray
    stencils: np.ndarray


class Plan:
    """The rows of a bank of stencils, for each order those of all operators and those that span the turned polynomials.

    If the group holds the point reflection, and stencils of even and odd order are even and odd, then parts 0 and 1 are the
    sums and differences of pairs of components: an operator of even order keeps the part, one of odd order swaps it."""

    def __init__(self, stencils, indices, strides, padding, fold, span):
        self.strides, self.padding, self.size = strides, padding, stencils.shape[1]
        degrees, axes, every = np.array([sum(alpha) for alpha in indices]), range(1, stencils.ndim), np.eye(len(indices))
        sign = (1 - 2 * (degrees % 2)).reshape(-1, *[1] * len(axes))
        self.fold = fold if np.allclose(np.flip(stencils, axes), sign * stencils, atol=1e-12) else None
        self.parts = 2 if self.fold else 1
        span = every[None] if span is None else span[list(self.fold.target[0])] if self.fold else span
        self.orders = []
        for degree in range(degrees.max() + 1):
            operators, base = every[degrees == degree, None], spanned(span, degrees == degree).swapaxes(0, 1)
            self.orders.append(tuple([Row(degree % self.parts, w, np.tensordot(w, stencils, 1)) for w in rows] for rows in (
                operators, base if len(base) < len(operators) else operators)))

    def sides(self, inputs, outputs):
        """The rows to apply to the input and to the output, given the bytes of either where it meets a row."""
        on_input, on_output = [], []
        for operators, base in self.orders:
            if len(operators) * inputs <= len(base) * outputs:
                on_input += operators
            else:
                on_output += base
        return on_input, on_output


@functools.lru_cache(maxsize=256)
def plan(stencils, indices, strides, padding, fold, span):
    return Plan(thawed(stencils), indices, strides, padding, fold, span and thawed(span))


@functools.partial(jax.jit, static_argnums=2)
def convolve(x, coefficients, plan):
    """``coefficients`` are those of ``plan.fold.target[0]`` alone where the plan folds."""
    x, dtype, fold = hold(view(x)), x.dtype, plan.fold
    parts, kernels = [x], [coefficients]
    if fold and fold.source:
        x1, x2 = (take(x, s, 0) for s in fold.source)
        c1, c2 = (take(coefficients, s, 2) for s in fold.source)
        parts, kernels = [x1 + x2, x1 - x2], [(c1 + c2) / 2, (c1 - c2) / 2]
    n, _, _, features, out = coefficients.shape
    kernels = [k.transpose(0, 4, 3, 2, 1).reshape(n, out, features, -1) for k in kernels]
    y = _pipeline(plan, tuple(p.reshape(-1, *p.shape[2:]) for p in parts), tuple(kernels))
    y = [p.reshape(out, features, *p.shape[1:]) for p in y]
    if fold:
        y = [take(jnp.concatenate([y[0] + y[1], y[0] - y[1]]), np.argsort([*fold.target[0], *fold.target[1]]), 0)]
    return restore(hold(y[0].astype(dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pipeline(plan, parts, kernels):
    return _forward(plan, parts, kernels)


@functools.partial(jax.jit, static_argnums=0)
def _forward(plan, parts, kernels):
    """Parts [rows, *space, batch] and kernels [operators, components, features, rows] -> parts [out rows, *space', batch]."""
    parts = [pad(p, plan.padding, [1] * len(plan.strides)) for p in parts]
    space = [(n - plan.size) // s + 1 for n, s in zip(parts[0].shape[1:-1], plan.strides, strict=True)]
    outputs, dtype = math.prod(kernels[0].shape[1:3]), parts[0].dtype
    on_input, on_output = plan.sides(dtype.itemsize * len(parts[0]) * math.prod(space),
                                     4 * outputs * math.prod(parts[0].shape[1:-1]))
    matrices, y = [_matrix(on_input, k, dtype) if on_input else () for k in kernels], []
    for q in range(plan.parts):
        met = [(matrix[i], part, row) for p, (part, matrix) in enumerate(zip(parts, matrices, strict=True))
               for i, row in enumerate(on_input) if (p + row.odd) % plan.parts == q]
        total = jnp.zeros((outputs, *space, parts[0].shape[-1]), jnp.float32)
        for some in few(met):
            u = _stack([(part, row.stencils) for _, part, row in some], plan.strides, dtype)
            matrix = barrier(jnp.concatenate([m for m, _, _ in some], 1))
            total += dot(matrix, u, ((1,), (0,))).reshape(total.shape)
        y.append(total)
    if on_output:
        for p, (part, k) in enumerate(zip(parts, kernels, strict=True)):
            matrix, flat = _matrix(on_output, k, dtype), part.reshape(len(part), -1)
            for i, row in enumerate(on_output):
                z = dot(barrier(matrix[i]), flat, ((1,), (0,))).reshape(outputs, *part.shape[1:])
                y[(p + row.odd) % plan.parts] += _turned(z, row.stencils, plan.strides)
    return tuple(map(hold, y))


def _matrix(rows, kernel, dtype):
    """δ of the rows: [rows, components · features, rows of the input]"""
    weights = _weights(rows, kernel.dtype)
    kernel = kernel.reshape(len(kernel), weights.shape[1], -1, kernel.shape[-1])
    matrix = jnp.einsum("jan,nafi->jafi", weights, kernel)
    return matrix.reshape(len(rows), -1, kernel.shape[-1]).astype(dtype)


def _weights(rows, dtype):
    return jnp.asarray(np.stack(np.broadcast_arrays(*(row.weights for row in rows))), dtype)


def _pipeline_forward(plan, parts, kernels):
    return _forward(plan, parts, kernels), (parts, kernels)


@functools.partial(jax.jit, static_argnums=0)
def _pipeline_backward(plan, residuals, cotangents):
    parts, kernels = residuals
    dtype, shape = parts[0].dtype, parts[0].shape
    cotangents, steps = [d.astype(dtype) for d in cotangents], [1] * len(plan.strides)
    around = [(plan.size - 1 - low, n + low - (out - 1) * s - 1) for n, out, (low, _), s in zip(
        shape[1:-1], cotangents[0].shape[1:-1], plan.padding, plan.strides, strict=True)]
    padded = [pad(d.astype(jnp.float32), around, plan.strides) for d in cotangents]  # converted once, not for each row
    operators, rows = ([row for order in plan.orders for row in order[k]] for k in (0, 1))
    dparts, dkernels = [], []
    for q, (x, k) in enumerate(zip(parts, kernels, strict=True)):
        matrix, dx, met, gradient = _matrix(rows, k, dtype).transpose(2, 0, 1), 0, rows, []
        for some in few(range(len(rows))):
            u = _stack([(padded[(q + rows[i].odd) % plan.parts], np.flip(rows[i].stencils, range(1, 1 + len(steps))))
                        for i in some], steps, dtype)
            dx += dot(barrier(matrix[:, some.start:some.stop].reshape(len(x), -1)), u, ((1,), (0,)))
            gradient.append(dot(u, x.reshape(len(x), -1), ((1,), (1,))))
        dparts.append(dx.reshape(shape).astype(dtype))
        if 4 * len(x) <= math.prod(k.shape[1:3]):  # few inputs, such as an image: the operators act on them
            x, met, gradient = pad(x, plan.padding, steps), operators, []
            for row in operators:
                u = _stack([(x, row.stencils)], plan.strides, dtype)
                gradient.append(dot(cotangents[(q + row.odd) % plan.parts].reshape(-1, u.shape[1]), u, ((1,), (1,))))
        weights = _weights(met, k.dtype)
        gradient = jnp.concatenate(gradient).reshape(*weights.shape[:2], -1, k.shape[3])
        dkernels.append(jnp.einsum("jan,jafi->nafi", weights, gradient).reshape(k.shape).astype(k.dtype))
    return tuple(dparts), tuple(dkernels)


_pipeline.defvjp(_pipeline_forward, _pipeline_backward)


def _stack(pairs, strides, dtype):
    """[rows, points]: each (x, stencils), one after another."""
    u = barrier(jnp.concatenate([_turned(x, stencils, strides).astype(dtype) for x, stencils in pairs]))
    return u.reshape(len(u), -1)


def _turned(x, stencils, strides):
    """x [rows, *space, batch], correlated with a stencil for each output component, or with one for all; in float32."""
    if len(stencils) == 1:
        return taps(x, stencils[0], 1, strides)
    y, total = x.reshape(len(stencils), -1, *x.shape[1:]).astype(jnp.float32), None
    size = (np.array(y.shape[2:-1]) - stencils.shape[1:]) // strides * strides + 1
    for point in np.argwhere(np.abs(stencils).max(0) > 1e-12):
        v = jax.lax.slice(y, (0, 0, *point, 0), (*y.shape[:2], *point + size, y.shape[-1]), (1, 1, *strides, 1))
        weight = stencils[(slice(None), *point)].astype(np.float32)
        v = jax.lax.mul(v, jax.lax.broadcast_in_dim(weight, v.shape, (0,)))
        total = v if total is None else jax.lax.add(total, v)
    return total.reshape(-1, *total.shape[2:])
