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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pdo_jax.lowering.layout import around, barrier, dot, few, hold, merge, pad, put, restore, spanned, split, take, taps, view

SIGN = np.array([-1, 1], np.float32).reshape(1, -1, 1, 1, 1, 1)


class Row(NamedTuple):
    """A row of an operand: Σ stencil X_{n + shift} over the pairs in ``terms``, or its real part where ``parts`` is 1.

    Its matrix at frequency n is Σ_α weights[α] C_α[n + at], with C_α[n] the transform of the coefficients of ∂^α."""

    terms: list[tuple[np.ndarray, int]]
    parts: int
    weights: np.ndarray
    at: int


class Operand(NamedTuple):
    """The rows of an operand, and the constant [frequencies, parts, parts of the rows, operators · N] that turns base
    coefficients into the matrices that meet them."""

    rows: list[Row]
    constant: np.ndarray


class Band(NamedTuple):
    """Frequencies that are computed together: those with an imaginary part, or those without (0 and N/2)."""

    frequencies: range
    parts: int
    layer: Operand
    adjoint: Operand


class Fourier:
    """A layer: the bands of its stencils.

    ``waves`` [frequencies · parts of the bands, N] is the Fourier transform of a field, ``inverse`` its inverse; rows of
    layers meet the frequencies ``held[0]`` of the input, those of adjoints ``held[1]`` of the cotangent."""

    def __init__(self, layer: Any):
        self.layer, self.strides, self.padding, self.turn = layer, layer.strides, layer.padding, layer.turn
        stencils, indices, span, turn = layer.stencils, layer.indices, layer.span, layer.turn
        self.wanted: tuple[int, ...] = tuple(orbit[0] for orbit in turn.target)
        order, reach = len(turn.target[0]), max(map(sum, indices))
        terms = [(a, r - a) for r in range(reach + 1) for a in range(r + 1)]
        mix = np.zeros((len(terms), len(indices)), complex)  # D^a D̄^b = Σ mix ∂^α
        for row, (a, b) in zip(mix, terms, strict=True):
            for i, j in itertools.product(range(a + 1), range(b + 1)):  # so many of each factor are ∂_1
                row[indices.index((a + b - i - j, i + j))] += math.comb(a, i) * math.comb(b, j) * 1j**i * (-1j) ** j
            row /= math.sqrt(2) ** (a + b)
        inverse, stencils = np.linalg.inv(mix), np.tensordot(mix, stencils, 1)
        middle, ends = range(1, (order + 1) // 2), range(0, order // 2 + 1, order // 2) if order % 2 == 0 else range(1)
        span = np.eye(len(indices)) if span is None else span[list(self.wanted)].reshape(-1, len(indices))
        self.bands: list[Band] = []
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
        self.waves: np.ndarray = np.concatenate([_waves(order, band.frequencies, band.parts) for band in self.bands])
        self.inverse, self.held = self.waves.T / (self.waves ** 2).sum(1), []
        for operands in zip(*((band.layer, band.adjoint) for band in self.bands), strict=True):
            met = {n + shift for band, operand in zip(self.bands, operands, strict=True) for row in operand.rows
                   for _, shift in row.terms for n in band.frequencies}
            self.held.append(range(min(met), max(met) + 1))

    # The three functions of the form

    def output(self, x: jax.Array, w: jax.Array) -> jax.Array:
        base, dtype = self._base(w), x.dtype
        spectrum = _spectrum(self.held[0], pad(self._orbits(x, self.turn.source).astype(jnp.float32), self.padding, (1, 1)))
        y = [_product(_matrix(band.layer, base, dtype), self._operand(band, False, spectrum, dtype)) for band in self.bands]
        return self._field(y, self.turn.target, dtype)

    def input(self, w: jax.Array, g: jax.Array) -> jax.Array:
        base, spectrum = self._base(w).swapaxes(1, 2), self._adjoint_spectrum(g)
        dx = [_product(_matrix(band.adjoint, base, g.dtype), self._operand(band, True, spectrum, g.dtype))
              for band in self.bands]
        return self._field(dx, self.turn.source, g.dtype)

    def weight(self, x: jax.Array, g: jax.Array) -> jax.Array:
        spectrum, order, dbase = self._adjoint_spectrum(g), len(self.turn.target[0]), 0
        z = barrier(_transform(self.waves, self._orbits(x, self.turn.source)))
        for band in self.bands:
            count = len(band.frequencies) * band.parts
            mine, z = z[:count].astype(x.dtype), z[count:]
            mine = merge(split(mine, 0, len(band.frequencies)), 1)  # [frequencies, parts · in, *space, batch]
            points = tuple(range(2, mine.ndim))
            blocks = jnp.concatenate([dot(u, mine, (points, points), ((0,), (0,)))
                                      for u in self._operand(band, True, spectrum, x.dtype)], 1)
            out, into = (len(orbits) * n for orbits, n in (
                (self.turn.target, self.layer.outputs[0]), (self.turn.source, self.layer.inputs[0])))
            blocks = blocks.reshape(*band.adjoint.constant.shape[:3:2], out, band.parts, into)
            constant = jnp.asarray(band.adjoint.constant * band.parts / order, jnp.float32)
            dbase += jnp.einsum("npra,nropi->aoi", constant, blocks)
        return self._coefficients(dbase)

    # The two sides of a layer as orbits, and back

    def _orbits(self, x, orbits):
        """[orbits, N, channels, *space, batch]"""
        return split(take(hold(view(x)), np.array(orbits).reshape(-1), 0), 0, len(orbits))

    def _field(self, bands, orbits, dtype):
        """The inverse transform of arrays [frequencies, parts · orbits · channels, *space, batch], as a field."""
        y = jnp.concatenate([merge(split(split(y, 1, band.parts), 2, len(orbits)))
                             for band, y in zip(self.bands, bands, strict=True)])
        y = dot(jnp.asarray(self.inverse, y.dtype), y, ((1,), (0,))).swapaxes(0, 1)
        return restore(hold(put([merge(y).astype(dtype)], orbits, 0)))

    def _base(self, w):
        """[operators · N, orbits · features, orbits · channels], of the first component of each orbit of the output."""
        source = np.array(self.turn.source)
        base = take(self.layer.coefficients(w, self.wanted), source.reshape(-1), 2)
        base = base.reshape(*base.shape[:2], *source.shape, *base.shape[3:]).transpose(0, 3, 5, 4, 2, 1)
        return merge(merge(merge(base, 4), 2), 0)

    def _coefficients(self, dbase):
        """The adjoint of :meth:`_base`."""
        layer, source = self.layer, np.array(self.turn.source)
        base = dbase.reshape(-1, source.shape[1], len(self.wanted), layer.outputs[0], len(source), layer.inputs[0])
        base = merge(base.transpose(0, 5, 4, 1, 3, 2), 2)  # [operators, channels, orbits · N, features, orbits]
        return layer.pull_back(put([base], self.turn.source, 2), self.wanted)

    def _adjoint_spectrum(self, g):
        space = self.layer.space
        edges = around(self.layer.size, space, g.shape[1:3], self.padding, self.strides)
        return _spectrum(self.held[1], pad(self._orbits(g, self.turn.target).astype(jnp.float32), edges, self.strides))

    def _operand(self, band, adjoint, spectrum, dtype):
        """Stacks [frequencies, parts of some rows · channels, *space, batch]."""
        rows, strides = (band.adjoint.rows, (1, 1)) if adjoint else (band.layer.rows, self.strides)
        first, last = (n - self.held[adjoint][0] for n in (band.frequencies[0], band.frequencies[-1]))
        stacks = []
        for some in few(rows):
            pieces = [_row(row, spectrum, range(first, last + 1, band.frequencies.step), strides) for row in some]
            stacks.append(hold(jnp.concatenate([piece.astype(dtype) for piece in pieces], 1)))
        return [merge(stack, 1) for stack in stacks]


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


def _transform(waves, x):
    """[rows, N], [orbits, N, channels, *space, batch] -> float32 [rows, orbits · channels, *space, batch]."""
    y = dot(jnp.asarray(waves, jnp.float32), x.astype(jnp.float32), ((1,), (1,)))
    return merge(y, 1)


def _spectrum(held, x):
    """[frequencies, 2, orbits · channels, *space, batch]"""
    return hold(split(_transform(_waves(x.shape[1], held, 2), x), 0, len(held)))


def _matrix(operand, base, dtype):
    """[frequencies, parts · out, parts of rows · in]"""
    matrix = dot(jnp.asarray(operand.constant, base.dtype), base, ((3,), (0,)))  # [frequencies, parts, parts of rows, out, in]
    matrix = matrix.swapaxes(2, 3).astype(dtype)
    return barrier(merge(merge(matrix, 3), 1))


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
    return sum(dot(matrix[:, :, end - u.shape[1]:end], u, ((2,), (1,)), ((0,), (0,)))
               for u, end in zip(operand, ends, strict=True))
