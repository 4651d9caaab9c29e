"""The "fourier" lowering, for the plane: a PDO-eConv that commutes with a rotation is block-diagonal in angular frequency.

With D = (∂_0 + i∂_1)/√2, the operator D^a D̄^b turned by θ = 2π/N is itself times e^{-iθ(a-b)}. So between the discrete Fourier
transforms X, Y over the N components of an orbit under that rotation, a layer and its adjoint are

    Y_m  = Σ_ab Γ_ab[m+a-b] D^a D̄^b X_{m+a-b}              frequencies modulo N,
    dX_n = Σ_j δ_j[n]^H Σ_ab (q_jab D^a D̄^b)^* dY_{n-a+b},     Γ_ab[n] = Σ_j q_jab δ_j[n],

with one complex [out, in] matrix for each operator and frequency: about 15·2·N real products for each pair of channels on 5×5,
where the dense convolution takes 25·N². The q_j span the base polynomials (the paper's nine), which are all that an adjoint
meets. Frequencies 0 … N/2 are computed, as real matrix products over arrays [frequency, part, channels, *space, batch]; the
others are their conjugates.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pdo_jax.layout import barrier, dot, hold, pad, restore, take, taps, view

ROWS = 5  # stacked at a time: XLA fuses a concatenation of few arrays with what makes them, and copies many


class Row(NamedTuple):
    """A row of an operand: Σ stencil X_{n + shift} over the pairs in ``terms``, or its real part where ``parts`` is 1.

    Its matrix at frequency n is Σ_α weights[α] C_α[n + at], with C_α[n] the transform of the coefficients of ∂^α."""

    terms: list
    parts: int
    weights: np.ndarray
    at: int


class Operand(NamedTuple):
    """The rows of an operand, and the constant [frequencies, parts, parts of the rows, operators · N] that turns base
    coefficients into the matrices that meet them; ``waves`` lead to the spectrum, of which the frequencies that a shift leads
    to are a slice from ``start[shift]`` on."""

    rows: list
    constant: np.ndarray
    waves: np.ndarray
    start: dict


class Band(NamedTuple):
    """Frequencies that are computed together: those with an imaginary part, or those without (0 and N/2).

    ``waves`` [frequencies, parts, N] is the Fourier transform, ``inverse`` [N, frequencies, parts] its inverse."""

    layer: Operand
    adjoint: Operand
    waves: np.ndarray
    inverse: np.ndarray


class Plan:
    """The bands of a bank of stencils."""

    def __init__(self, stencils, indices, strides, padding, turn):
        self.strides, self.padding, self.turn, self.size = strides, padding, turn, stencils.shape[1:]
        order, reach = len(turn.target[0]), max(map(sum, indices))
        terms = [(a, r - a) for r in range(reach + 1) for a in range(r + 1)]
        mix = np.zeros((len(terms), len(indices)), complex)  # D^a D̄^b = Σ mix ∂^α
        for row, (a, b) in zip(mix, terms, strict=True):
            for i, j in itertools.product(range(a + 1), range(b + 1)):  # so many of each factor are ∂_1
                row[indices.index((a + b - i - j, i + j))] += math.comb(a, i) * math.comb(b, j) * 1j**i * (-1j) ** j
            row /= math.sqrt(2) ** (a + b)
        inverse, stencils = np.linalg.inv(mix), np.tensordot(mix, stencils, 1)
        middle, ends = range(1, (order + 1) // 2), range(0, order // 2 + 1, order // 2) if order % 2 == 0 else range(1)
        self.bands = []
        for frequencies, parts in ((middle, 2), (ends, 1)):
            rows, adjoint_rows = [], []
            for degree in range(reach + 1):  # at a real frequency D^b D̄^a is the conjugate of D^a D̄^b, which counts twice
                mine = [(t, a - b, 2 if parts == 1 and a > b else 1) for t, (a, b) in enumerate(terms)
                        if a + b == degree and (parts == 2 or a >= b)]
                rotated = {t: np.flip(stencils[t].conj()) for t, _, _ in mine}
                kept = [parts if f == 0 else 2 for _, f, _ in mine]
                rows += [Row([(stencils[t], f)], k, inverse[:, t] * c, f) for (t, f, c), k in zip(mine, kept, strict=True)]
                base = _span(np.array(turn.span) * [sum(alpha) == degree for alpha in indices])
                if len(base) > degree:  # all operators of this degree
                    adjoint_rows += [Row([(rotated[t], -f)], k, inverse[:, t] * c, 0)
                                     for (t, f, c), k in zip(mine, kept, strict=True)]
                else:
                    adjoint_rows += [Row([(rotated[t] * (q @ inverse[:, t]).conj() * c, -f) for t, f, c in mine], parts, q, 0)
                                     for q in base]
            if frequencies:
                waves = _waves(order, frequencies, parts)
                self.bands.append(Band(_operand_plan(order, frequencies, parts, rows, False),
                                       _operand_plan(order, frequencies, parts, adjoint_rows, True),
                                       waves, waves.transpose(2, 0, 1) * parts / order))


def _span(rows):
    """An orthonormal basis of the space of the rows."""
    return np.linalg.svd(rows)[2][:np.linalg.matrix_rank(rows)]


def _waves(order, frequencies, parts):
    """[frequencies, parts, N]: X_n = Σ_c x_c e^{-2πi n c / N}."""
    waves = np.exp(-2j * np.pi / order * np.outer(frequencies, range(order)))
    return np.stack([waves.real, waves.imag][:parts], 1)


def _operand_plan(order, frequencies, parts, rows, adjoint):
    shifts = sorted({shift for row in rows for _, shift in row.terms})
    if frequencies.step == 1:
        held = range(frequencies[0] + shifts[0], frequencies[-1] + shifts[-1] + 1)
        start = {shift: frequencies[0] + shift - held[0] for shift in shifts}
    else:
        held = [n + shift for shift in shifts for n in frequencies]
        start = {shift: k * len(frequencies) for k, shift in enumerate(shifts)}
    columns = []
    for row in rows:
        phases = np.exp(2j * np.pi / order * np.outer(np.array(frequencies) + row.at, range(order)))
        c = np.einsum("a,nr->nar", row.weights, phases).reshape(len(frequencies), -1)
        c = c.conj() if adjoint else c
        columns += [np.stack(column[:parts], 1) for column in ([c.real, c.imag], [-c.imag, c.real])[:row.parts]]
    return Operand(rows, np.stack(columns, 2), _waves(order, held, 2), start)


@functools.lru_cache(maxsize=256)
def plan(data, shape, *rest):
    return Plan(np.frombuffer(data).reshape(shape), *rest)


@functools.partial(jax.jit, static_argnums=2)
def convolve(x, coefficients, plan):
    source, target = (np.array(orbits) for orbits in (plan.turn.source, plan.turn.target))
    x = take(hold(view(x)), source.reshape(-1), 0)
    base = take(coefficients, source.reshape(-1), 2)  # [operators, channels, orbits · N, features, orbits]
    base = base.reshape(*base.shape[:2], *source.shape, *base.shape[3:]).transpose(0, 3, 5, 4, 2, 1)
    base = base.reshape(base.shape[0] * base.shape[1], base.shape[2] * base.shape[3], -1)
    y = _layer(plan, x.reshape(*source.shape, *x.shape[1:]), base)
    y = take(y.reshape(-1, *y.shape[2:]), np.argsort(target.reshape(-1)), 0)
    return restore(hold(y))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(plan, x, base):
    return _forward(plan, x, base)


@functools.partial(jax.jit, static_argnums=0)
def _forward(plan, x, base):
    """x [orbits, N, channels, *space, batch], base [operators · N, orbits · features, orbits · channels] -> y, like x."""
    padded, y = pad(x.astype(jnp.float32), plan.padding, (1, 1)), 0
    for band in plan.bands:
        operand = _operand(band.layer, len(band.waves), padded, plan.strides, x.dtype)
        y += _field(band, _product(_matrix(band.layer, base, x.dtype), operand), len(plan.turn.target))
    return y.astype(x.dtype)


def _layer_forward(plan, x, base):
    return _forward(plan, x, base), (x, base)


@functools.partial(jax.jit, static_argnums=0)
def _layer_backward(plan, residuals, dy):
    x, base = residuals
    around = [(k - 1 - low, n + low - (out - 1) * s - 1) for k, n, out, (low, _), s in zip(
        plan.size, x.shape[3:5], dy.shape[3:5], plan.padding, plan.strides, strict=True)]
    dy, dx, dbase = pad(dy.astype(jnp.float32), around, plan.strides), 0, 0
    for band in plan.bands:
        operand = _operand(band.adjoint, len(band.waves), dy, (1, 1), x.dtype)
        dx += _field(band, _product(_matrix(band.adjoint, base.swapaxes(1, 2), x.dtype), operand), x.shape[0])
        z = _transform(band.waves, x).astype(x.dtype)
        z = z.reshape(len(z), -1, math.prod(z.shape[3:]))  # [frequencies, parts · in, points]
        blocks = jnp.concatenate([_batched(u, z, 2) for u in operand], 1)  # [frequencies, parts of rows · out, parts · in]
        blocks = blocks.reshape(*band.adjoint.constant.shape[:3:2], base.shape[1], -1, base.shape[2])
        constant = jnp.asarray(band.adjoint.constant * band.waves.shape[1] / band.waves.shape[2], jnp.float32)
        dbase += jnp.einsum("npra,nropi->aoi", constant, blocks)
    return dx.astype(x.dtype), dbase.astype(base.dtype)


_layer.defvjp(_layer_forward, _layer_backward)


def _transform(waves, x):
    """[frequencies, parts, N], [orbits, N, channels, *space, batch] -> float32 [frequencies, parts, orbits · channels, …]."""
    y = dot(jnp.asarray(waves, jnp.float32), x.astype(jnp.float32), ((2,), (1,)))
    return barrier(y.reshape(*y.shape[:2], -1, *y.shape[4:]))


def _field(band, y, orbits):
    """The inverse, of [frequencies, parts · orbits · channels, *space, batch]."""
    y = y.reshape(*band.waves.shape[:2], orbits, -1, *y.shape[2:])
    return dot(jnp.asarray(band.inverse, y.dtype), y, ((1, 2), (0, 1))).swapaxes(0, 1)


def _matrix(operand, base, dtype):
    """[frequencies, parts · out, parts of rows · in]"""
    matrix = dot(jnp.asarray(operand.constant, base.dtype), base, ((3,), (0,)))  # [frequencies, parts, parts of rows, out, in]
    matrix = matrix.swapaxes(2, 3).astype(dtype)
    return barrier(matrix.reshape(len(matrix), -1, matrix.shape[3] * matrix.shape[4]))


def _operand(plan, frequencies, x, strides, dtype):
    """Stacks [frequencies, parts of some rows · channels, *space, batch]."""
    spectrum, stacks, shifted = _transform(plan.waves, x), [], {}
    for shift, start in plan.start.items():
        x = jax.lax.slice_in_dim(spectrum, start, start + frequencies)
        shifted[shift] = x, jax.lax.rev(x, (1,))  # (X, X'), (X', X)
    for i in range(0, len(plan.rows), ROWS):
        pieces = [_row(row, shifted, strides).astype(dtype) for row in plan.rows[i:i + ROWS]]
        stacks.append(barrier(jnp.concatenate(pieces, 1)))
    return [stack.reshape(len(stack), -1, *stack.shape[3:]) for stack in stacks]


def _row(row, shifted, strides):
    real, imaginary = [], []
    for stencil, shift in row.terms:
        for total, x, half in zip((real, imaginary), shifted[shift], (stencil.real, stencil.imag), strict=True):
            half = np.where(np.abs(half) > 1e-12, half, 0)
            if half.any():
                total.append(taps(x, half, 3, strides, row.parts))
    if imaginary:  # i (X + iX') = -X' + iX
        sign = np.array([-1, 1], np.float32)[:row.parts].reshape(-1, 1, 1, 1, 1)
        real.append(functools.reduce(jax.lax.add, imaginary) * sign)
    return functools.reduce(jax.lax.add, real)


def _product(matrix, operand):
    """[frequencies, parts · out, *space, batch] float32."""
    ends = np.cumsum([u.shape[1] for u in operand])
    y = sum(_batched(matrix[:, :, end - u.shape[1]:end], u, 1) for u, end in zip(operand, ends, strict=True))
    return y.reshape(*y.shape[:2], *operand[0].shape[2:])


def _batched(a, b, axis):
    """A matrix product for each frequency, over rows (axis 1) or points (axis 2)."""
    a, b = (v.reshape(*v.shape[:2], -1) for v in (a, b))
    return jax.lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)
