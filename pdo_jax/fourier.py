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

from pdo_jax.layout import barrier, dot, few, hold, pad, restore, spanned, take, taps, thawed, view

SIGN = np.array([-1, 1], np.float32).reshape(-1, 1, 1, 1, 1)


class Row(NamedTuple):
    """A row of an operand: Σ stencil X_{n + shift} over the pairs in ``terms``, or its real part where ``parts`` is 1.

    Its matrix at frequency n is Σ_α weights[α] C_α[n + at], with C_α[n] the transform of the coefficients of ∂^α."""

    terms: list
    parts: int
    weights: np.ndarray
    at: int


class Operand(NamedTuple):
    """The rows of an operand, and the constant [frequencies, parts, parts of the rows, operators · N] that turns base
    coefficients into the matrices that meet them."""

    rows: list
    constant: np.ndarray


class Band(NamedTuple):
    """Frequencies that are computed together: those with an imaginary part, or those without (0 and N/2)."""

    frequencies: range
    parts: int
    layer: Operand
    adjoint: Operand


class Plan:
    """The bands of a bank of stencils.

    ``waves`` [frequencies · parts of the bands, N] is the Fourier transform of a field, ``inverse`` its inverse; rows of
    layers meet the frequencies ``held[0]`` of the input, those of adjoints ``held[1]`` of the cotangent."""

    def __init__(self, stencils, indices, strides, padding, turn, span):
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
        starts = [orbit[0] for orbit in turn.target]
        span = np.eye(len(indices)) if span is None else span[starts].reshape(-1, len(indices))
        self.bands = []
        for frequencies, parts in ((middle, 2), (ends, 1)):
            rows, adjoint_rows = [], []
            for degree in range(reach + 1):  # at a real frequency D^b D̄^a is the conjugate of D^a D̄^b, which counts twice
                mine = [(t, a - b, 2 if parts == 1 and a > b else 1) for t, (a, b) in enumerate(terms)
                        if a + b == degree and (parts == 2 or a >= b)]
                rotated = {t: np.flip(stencils[t].conj()) for t, _, _ in mine}
                kept = [parts if f == 0 else 2 for _, f, _ in mine]
                rows += [Row([(stencils[t], f)], k, inverse[:, t] * c, f) for (t, f, c), k in zip(mine, kept, strict=True)]
                base = spanned(span, [sum(alpha) == degree for alpha in indices])
                if len(base) > degree:  # all operators of this degree
                    adjoint_rows += [Row([(rotated[t], -f)], k, inverse[:, t] * c, 0)
                                     for (t, f, c), k in zip(mine, kept, strict=True)]
                else:
                    adjoint_rows += [Row([(rotated[t] * (q @ inverse[:, t]).conj() * c, -f) for t, f, c in mine], parts, q, 0)
                                     for q in base]
            if frequencies:
                self.bands.append(Band(frequencies, parts, _operand_plan(order, frequencies, parts, rows, False),
                                       _operand_plan(order, frequencies, parts, adjoint_rows, True)))
        self.waves = np.concatenate([_waves(order, band.frequencies, band.parts) for band in self.bands])
        self.inverse, self.held = self.waves.T / (self.waves ** 2).sum(1), []
        for operands in zip(*((band.layer, band.adjoint) for band in self.bands), strict=True):
            met = {n + shift for band, operand in zip(self.bands, operands, strict=True) for row in operand.rows
                   for _, shift in row.terms for n in band.frequencies}
            self.held.append(range(min(met), max(met) + 1))


def _waves(order, frequencies, parts):
    """[frequencies · parts, N]: X_n = Σ_c x_c e^{-2πi n c / N}."""
    waves = np.exp(-2j * np.pi / order * np.outer(frequencies, range(order)))
    return np.stack([waves.real, waves.imag][:parts], 1).reshape(-1, order)


def _operand_plan(order, frequencies, parts, rows, adjoint):
    columns = []
    for row in rows:
        phases = np.exp(2j * np.pi / order * np.outer(np.array(frequencies) + row.at, range(order)))
        c = np.einsum("a,nr->nar", row.weights, phases).reshape(len(frequencies), -1)
        c = c.conj() if adjoint else c
        columns += [np.stack(column[:parts], 1) for column in ([c.real, c.imag], [-c.imag, c.real])[:row.parts]]
    return Operand(rows, np.stack(columns, 2))


@functools.lru_cache(maxsize=256)
def plan(stencils, indices, strides, padding, turn, span):
    return Plan(thawed(stencils), indices, strides, padding, turn, span and thawed(span))


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
    spectrum = _spectrum(plan.held[0], pad(x.astype(jnp.float32), plan.padding, (1, 1)))
    y = [_product(_matrix(band.layer, base, x.dtype), _operand(plan, band, False, spectrum, x.dtype)) for band in plan.bands]
    return _field(plan, y, len(plan.turn.target)).astype(x.dtype)


def _layer_forward(plan, x, base):
    return _forward(plan, x, base), (x, base)


@functools.partial(jax.jit, static_argnums=0)
def _layer_backward(plan, residuals, dy):
    x, base = residuals
    around = [(k - 1 - low, n + low - (out - 1) * s - 1) for k, n, out, (low, _), s in zip(
        plan.size, x.shape[3:5], dy.shape[3:5], plan.padding, plan.strides, strict=True)]
    order, dx, dbase = x.shape[1], [], 0
    spectrum = _spectrum(plan.held[1], pad(dy.astype(jnp.float32), around, plan.strides))
    z = barrier(_transform(plan.waves, x))
    for band in plan.bands:
        operand = _operand(plan, band, True, spectrum, x.dtype)
        dx.append(_product(_matrix(band.adjoint, base.swapaxes(1, 2), x.dtype), operand))
        mine, z = z[:len(band.frequencies) * band.parts].astype(x.dtype), z[len(band.frequencies) * band.parts:]
        mine = mine.reshape(len(band.frequencies), -1, math.prod(z.shape[2:]))  # [frequencies, parts · in, points]
        blocks = jnp.concatenate([_batched(u, mine, 2) for u in operand], 1)  # [frequencies, parts of rows · out, parts · in]
        blocks = blocks.reshape(*band.adjoint.constant.shape[:3:2], base.shape[1], -1, base.shape[2])
        constant = jnp.asarray(band.adjoint.constant * band.parts / order, jnp.float32)
        dbase += jnp.einsum("npra,nropi->aoi", constant, blocks)
    return _field(plan, dx, x.shape[0]).astype(x.dtype), dbase.astype(base.dtype)


_layer.defvjp(_layer_forward, _layer_backward)


def _transform(waves, x):
    """[rows, N], [orbits, N, channels, *space, batch] -> float32 [rows, orbits · channels, *space, batch]."""
    y = dot(jnp.asarray(waves, jnp.float32), x.astype(jnp.float32), ((1,), (1,)))
    return y.reshape(len(y), -1, *y.shape[3:])


def _spectrum(held, x):
    """[frequencies, 2, orbits · channels, *space, batch]"""
    y = _transform(_waves(x.shape[1], held, 2), x)
    return hold(y.reshape(-1, 2, *y.shape[1:]))


def _field(plan, bands, orbits):
    """The inverse, of arrays [frequencies, parts · orbits · channels, *space, batch]."""
    y = jnp.concatenate([y.reshape(len(band.frequencies) * band.parts, orbits, -1, *y.shape[2:])
                         for band, y in zip(plan.bands, bands, strict=True)])
    return dot(jnp.asarray(plan.inverse, y.dtype), y, ((1,), (0,))).swapaxes(0, 1)


def _matrix(operand, base, dtype):
    """[frequencies, parts · out, parts of rows · in]"""
    matrix = dot(jnp.asarray(operand.constant, base.dtype), base, ((3,), (0,)))  # [frequencies, parts, parts of rows, out, in]
    matrix = matrix.swapaxes(2, 3).astype(dtype)
    return barrier(matrix.reshape(len(matrix), -1, matrix.shape[3] * matrix.shape[4]))


def _operand(plan, band, adjoint, spectrum, dtype):
    """Stacks [frequencies, parts of some rows · channels, *space, batch]."""
    rows, strides = (band.adjoint.rows, (1, 1)) if adjoint else (band.layer.rows, plan.strides)
    first, last = (n - plan.held[adjoint][0] for n in (band.frequencies[0], band.frequencies[-1]))
    stacks = []
    for some in few(rows):
        pieces = [_row(row, spectrum, range(first, last + 1, band.frequencies.step), strides) for row in some]
        stacks.append(hold(jnp.concatenate([piece.astype(dtype) for piece in pieces], 1)))
    return [stack.reshape(len(stack), -1, *stack.shape[3:]) for stack in stacks]


def _row(row, spectrum, frequencies, strides):
    halves = [], []  # those of the stencils' real parts, which meet (X, X'), and of their imaginary parts, which meet (-X', X)
    for stencil, shift in row.terms:
        shifted = range(frequencies.start + shift, frequencies.stop + shift, frequencies.step)
        for part, half in enumerate((stencil.real, stencil.imag)):
            half = np.where(np.abs(half) > 1e-12, half, 0)
            if half.any():
                parts = range(2) if row.parts == 2 else range(part, part + 1)
                halves[part].append(taps(spectrum, half, 3, strides, shifted, parts))
    real, imaginary = (functools.reduce(jax.lax.add, half) if half else None for half in halves)
    if imaginary is None:
        return real
    turned = jax.lax.neg(imaginary) if row.parts == 1 else SIGN * jax.lax.rev(imaginary, (1,))
    return turned if real is None else jax.lax.add(real, turned)


def _product(matrix, operand):
    """[frequencies, parts · out, *space, batch] float32."""
    ends = np.cumsum([u.shape[1] for u in operand])
    y = sum(_batched(matrix[:, :, end - u.shape[1]:end], u, 1) for u, end in zip(operand, ends, strict=True))
    return y.reshape(*y.shape[:2], *operand[0].shape[2:])


def _batched(a, b, axis):
    """A matrix product for each frequency, over rows (axis 1) or points (axis 2)."""
    a, b = (v.reshape(*v.shape[:2], -1) for v in (a, b))
    return jax.lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)
