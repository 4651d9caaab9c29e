"""The "matmul" lowering, in any dimension: a PDO-eConv as matrix products over the channels.

The coefficients of an output component A lie in the span of the base polynomials q_jA that A turned, of which there are fewer
than operators (on 5×5 nine, where all operators up to their order are fifteen; those up to second order are the same for all
A). So an operator is applied to the input, ∂^n x_C, or those of one order as a sum to the output:

    y_A = Σ_C Σ_n c_n(A, C) ∂^n x_C = Σ_j q_jA(∇) Σ_C δ_j(A, C) x_C,      c_n(A, C) = Σ_j q_jA[n] δ_j(A, C),

and the gradients need only the q_jA, on the cotangent g: with u_jA = q_jA(∇)* g_A,

    dx_C = Σ_jA δ_j(A, C) u_jA,      dδ_j(A, C) = ⟨u_jA, x_C⟩.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pdo_jax.lowering.layout import around, barrier, dot, few, hold, merge, pad, put, restore, spanned, split, take, taps, view


class Row(NamedTuple):
    """A polynomial for each output component, or one for all.

    ``weights`` [components or 1, operators] are its coefficients, ``stencils`` [components or 1, k, …, k] its stencils; an odd
    one swaps sums and differences."""

    odd: int
    weights: np.ndarray
    stencils: np.ndarray


class Matmul:
    """A layer: for each order the rows of all operators, and those that span the turned polynomials.

    If the group holds the point reflection, and stencils of even and odd order are even and odd, then parts 0 and 1 are the
    sums and differences of pairs of components: an operator of even order keeps the part, one of odd order swaps it."""

    def __init__(self, layer: Any):
        self.layer, self.strides, self.padding, self.size = layer, layer.strides, layer.padding, layer.size
        stencils, indices, span = layer.stencils, layer.indices, layer.span
        degrees, axes, every = np.array([sum(alpha) for alpha in indices]), range(1, stencils.ndim), np.eye(len(indices))
        sign = (1 - 2 * (degrees % 2)).reshape(-1, *[1] * len(axes))
        self.fold = layer.fold if np.allclose(np.flip(stencils, axes), sign * stencils, atol=1e-12) else None
        self.parts, self.wanted = 2 if self.fold else 1, self.fold and self.fold.target[0]
        span = every[None] if span is None else span[list(self.fold.target[0])] if self.fold else span
        self.orders: list[tuple[list[Row], ...]] = []
        for degree in range(degrees.max() + 1):
            operators, base = every[degrees == degree, None], spanned(span, degrees == degree).swapaxes(0, 1)
            self.orders.append(tuple([Row(degree % self.parts, w, np.tensordot(w, stencils, 1)) for w in rows] for rows in (
                operators, base if len(base) < len(operators) else operators)))

    def sides(self, inputs: int, outputs: int) -> tuple[list[Row], list[Row]]:
        """The rows to apply to the input and to the output, given the bytes of either where it meets a row."""
        on_input, on_output = [], []
        for operators, base in self.orders:
            if len(operators) * inputs <= len(base) * outputs:
                on_input += operators
            else:
                on_output += base
        return on_input, on_output

    # The three functions of the form

    def output(self, x: jax.Array, w: jax.Array) -> jax.Array:
        parts, kernels, dtype = self._parts(x), self._kernels(w), x.dtype
        parts = [pad(p, self.padding, [1] * len(self.strides)) for p in parts]
        space = [(n - k) // s + 1 for n, k, s in zip(parts[0].shape[1:-1], self.size, self.strides, strict=True)]
        outputs = math.prod(kernels[0].shape[1:3])
        on_input, on_output = self.sides(dtype.itemsize * len(parts[0]) * math.prod(space),
                                         4 * outputs * math.prod(parts[0].shape[1:-1]))
        matrices, y = [_matrix(on_input, k, dtype) if on_input else () for k in kernels], []
        for q in range(self.parts):
            met = [(matrix[i], part, row) for p, (part, matrix) in enumerate(zip(parts, matrices, strict=True))
                   for i, row in enumerate(on_input) if (p + row.odd) % self.parts == q]
            total = jnp.zeros((outputs, *space, parts[0].shape[-1]), jnp.float32)
            for some in few(met):
                u = _stack([(part, row.stencils) for _, part, row in some], self.strides, dtype)
                total += dot(barrier(jnp.concatenate([m for m, _, _ in some], 1)), u, ((1,), (0,)))
            y.append(total)
        if on_output:
            for p, (part, k) in enumerate(zip(parts, kernels, strict=True)):
                matrix = _matrix(on_output, k, dtype)
                for i, row in enumerate(on_output):
                    z = dot(barrier(matrix[i]), part, ((1,), (0,)))
                    y[(p + row.odd) % self.parts] += _turned(z, row.stencils, self.strides)
        y = [hold(p).reshape(*kernels[0].shape[1:3], *p.shape[1:]) for p in y]
        if self.fold:
            y = [put([y[0] + y[1], y[0] - y[1]], self.fold.target, 0)]
        return restore(hold(y[0].astype(dtype)))

    def input(self, w: jax.Array, g: jax.Array) -> jax.Array:
        dparts = []
        for k, (stacks, _) in zip(self._kernels(w), self._adjoint_stacks(g), strict=True):
            rows = [row for some, _ in stacks for row in some]
            matrix, dx, start = _matrix(rows, k, g.dtype).transpose(2, 0, 1), 0, 0
            for some, u in stacks:
                dx += dot(barrier(merge(matrix[:, start:start + len(some)], 1)), u, ((1,), (0,)))
                start += len(some)
            dparts.append(split(dx.astype(g.dtype), 0, len(dx) // self.layer.inputs[0]))
        if self.fold and self.fold.source:
            dparts = [put([dparts[0] + dparts[1], dparts[0] - dparts[1]], self.fold.source, 0)]
        return restore(hold(dparts[0]))

    def weight(self, x: jax.Array, g: jax.Array) -> jax.Array:
        dkernels, parts = [], self._parts(x)
        outputs = self.layer.outputs[0] * len(self.wanted or range(self.layer.outputs[1]))
        for x, (stacks, cotangents) in zip(parts, self._adjoint_stacks(g), strict=True):
            points = tuple(range(1, x.ndim))
            if 4 * len(x) <= outputs:  # few inputs, such as an image: the operators act on them
                met, x, gradient = [row for order, _ in self.orders for row in order], pad(
                    x, self.padding, [1] * len(self.strides)), []
                for row in met:
                    u = _stack([(x, row.stencils)], self.strides, g.dtype)
                    gradient.append(dot(cotangents[row.odd % self.parts], u, (points, points)))
            else:
                met = [row for some, _ in stacks for row in some]
                gradient = [dot(u, x, (points, points)) for _, u in stacks]
            weights = _weights(met, jnp.float32)
            gradient = jnp.concatenate(gradient).reshape(*weights.shape[:2], -1, len(x))
            dkernels.append(jnp.einsum("jan,jafi->nafi", weights, gradient))
        return self._coefficients(dkernels)

    # The two sides of a layer as parts, and back

    def _parts(self, x):
        """[rows, *space, batch]: sums and differences of pairs of components, where the layer folds."""
        x = hold(view(x))
        if self.fold and self.fold.source:
            x1, x2 = (take(x, s, 0) for s in self.fold.source)
            return [merge(x1 + x2), merge(x1 - x2)]
        return [merge(x)]

    def _kernels(self, w):
        """[operators, components, features, rows] for each part of the input."""
        c = self.layer.coefficients(w, self.wanted)
        kernels = [c]
        if self.fold and self.fold.source:
            c1, c2 = (take(c, s, 2) for s in self.fold.source)
            kernels = [(c1 + c2) / 2, (c1 - c2) / 2]
        return [merge(k.transpose(0, 4, 3, 2, 1), 3) for k in kernels]

    def _coefficients(self, dkernels):
        """The adjoint of :meth:`_kernels`."""
        channels, features = self.layer.inputs[0], self.layer.outputs[0]
        kernels = [k.reshape(len(k), -1, features, k.shape[-1] // channels, channels).transpose(0, 4, 3, 2, 1)
                   for k in dkernels]
        if self.fold and self.fold.source:
            kernels = [put([(kernels[0] + kernels[1]) / 2, (kernels[0] - kernels[1]) / 2], self.fold.source, 2)]
        return self.layer.pull_back(kernels[0], self.wanted)

    def _adjoint_stacks(self, g):
        """For each part of the input: [(some rows, their operators on the cotangent, stacked)], and the cotangent's parts, the
        one that meets even operators first."""
        dtype, g = g.dtype, hold(view(g))
        parts = [g]
        if self.fold:
            g1, g2 = (take(g, t, 0).astype(jnp.float32) for t in self.fold.target)
            parts = [g1 + g2, g1 - g2]
        parts = [merge(p.astype(dtype)) for p in parts]
        edges = around(self.size, self.layer.space, g.shape[2:-1], self.padding, self.strides)
        padded = [pad(p.astype(jnp.float32), edges, self.strides) for p in parts]  # converted once, not for each row
        rows, steps, result = [row for _, order in self.orders for row in order], [1] * len(self.strides), []
        for q in range(2 if self.fold and self.fold.source else 1):
            stacks = [(some, _stack([(padded[(q + row.odd) % self.parts], np.flip(row.stencils, range(1, 1 + len(steps))))
                                     for row in some], steps, dtype)) for some in few(rows)]
            result.append((stacks, [parts[(q + k) % self.parts] for k in range(self.parts)]))
        return result


def _matrix(rows, kernel, dtype):
    """δ of the rows: [rows, components · features, rows of the input]"""
    weights = _weights(rows, kernel.dtype)
    kernel = kernel.reshape(len(kernel), weights.shape[1], -1, kernel.shape[-1])
    matrix = jnp.einsum("jan,nafi->jafi", weights, kernel)
    return merge(matrix, 1).astype(dtype)


def _weights(rows, dtype):
    return jnp.asarray(np.stack(np.broadcast_arrays(*(row.weights for row in rows))), dtype)


def _stack(pairs, strides, dtype):
    """[rows, *space, batch]: each (x, stencils), one after another."""
    return barrier(jnp.concatenate([_turned(x, stencils, strides).astype(dtype) for x, stencils in pairs]))


def _turned(x, stencils, strides):
    """x [rows, *space, batch], correlated with a stencil for each output component, or with one for all; in float32."""
    if len(stencils) == 1:
        return taps(x, stencils[0], 1, strides)
    y, total = x.reshape(len(stencils), len(x) // len(stencils), *x.shape[1:]).astype(jnp.float32), None
    size = (np.array(y.shape[2:-1]) - stencils.shape[1:]) // strides * strides + 1
    for point in np.argwhere(np.abs(stencils).max(0) > 1e-12):
        v = jax.lax.slice(y, (0, 0, *point, 0), (*y.shape[:2], *point + size, y.shape[-1]), (1, 1, *strides, 1))
        weight = stencils[(slice(None), *point)].astype(np.float32)
        v = jax.lax.mul(v, jax.lax.broadcast_in_dim(weight, v.shape, (0,)))
        total = v if total is None else jax.lax.add(total, v)
    return merge(total)
