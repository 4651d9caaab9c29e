"""The "fourier" lowering, for the plane: a PDO-eConv that commutes with a rotation is block-diagonal in angular frequency.

With D = (∂_0 + i∂_1)/√2, the operator D^a D̄^b turned by θ = 2π/N is itself times e^{-iθ(a-b)}. So between the discrete Fourier
transforms X, Y over the N components of an orbit under that rotation, a layer is

    Y_m = Σ_{a,b} Γ_ab[m+a-b] D^a D̄^b X_{m+a-b},    frequencies modulo N,

with one complex [out, in] matrix for each operator and frequency: about 15·2·N real products for each pair of channels on 5×5,
where the dense convolution takes 25·N². The adjoint has the same form, with stencils turned by 180° and Γ_ba[n]^H for Γ_ab at
the output frequency n. Frequencies 0 … N/2 are computed, as real matrix products in the layout [channels, *space, batch]; the
others are their conjugates.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pdo_jax.layout import barrier, dot, flat, keep_layout, pad, take, taps

ROWS = 5  # stacked at a time; XLA fuses a concatenation of few arrays with what makes them, and copies many


class Plan:
    """The stencils of the complex derivatives, and which of them lead to which frequency.

    ``stencils[r, f]``: that of D^a D̄^b with r = a + b and f = a - b >= 0; for f < 0 it is the conjugate."""

    def __init__(self, stencils, indices, strides, padding, turn):
        self.strides, self.padding, self.turn, self.order = strides, padding, turn, len(turn.target[0])
        self.terms = [(a, r - a) for r in range(max(map(sum, indices)) + 1) for a in range(r + 1)]
        mix = np.zeros((len(self.terms), len(indices)), complex)
        for row, (a, b) in zip(mix, self.terms, strict=True):
            for i, j in itertools.product(range(a + 1), range(b + 1)):  # so many of each factor are ∂_1
                row[indices.index((a + b - i - j, i + j))] += math.comb(a, i) * math.comb(b, j) * 1j**i * (-1j) ** j
            row /= math.sqrt(2) ** (a + b)
        self.inverse = np.linalg.inv(mix)
        complex_stencils = np.tensordot(mix, stencils, 1)
        self.stencils = {(a + b, a - b): s for (a, b), s in zip(self.terms, complex_stencils, strict=True) if a >= b}
        halves = range(self.order // 2 + 1)
        self.inputs = list(halves) if turn.source else [0]
        self.outputs = [m for m in halves if any(True for _ in self.rows(m, self.inputs))]

    def real(self, m):
        """Whether frequency m is its own conjugate."""
        return 2 * m % self.order == 0

    def rows(self, m, inputs):
        """The operand of frequency m: (operator, stored frequency, whether X is its conjugate, 0 or 1 for real or imaginary).

        Of two conjugate terms of a real Y_m the one with a > b stands for both."""
        for a, b in self.terms:
            n = (m + a - b) % self.order
            stored = min(n, self.order - n)
            if stored in inputs and (a >= b or not self.real(m)):
                for part in range(1 if a == b and self.real(m) else 2):
                    yield (a, b), stored, n != stored, part

    def weights(self, base):
        """[operators, channels, components, features, orbits] -> Γ [2, terms, inputs, features · orbits, channels · orbits]."""
        source = np.array(self.turn.source or [[0]])
        steps = np.exp(2j * np.pi / self.order * np.outer(self.inputs, range(source.shape[1])))
        constant = np.einsum("at,nr->tnar", self.inverse, steps)
        constant = jnp.asarray(np.stack([constant.real, constant.imag]), base.dtype)
        base = base[:, :, source]  # [operators, channels, orbits, steps, features, orbits]
        gamma = jnp.einsum("ptnar,aisrfo->ptnfois", constant, base)
        return gamma.reshape(*gamma.shape[:3], math.prod(gamma.shape[3:5]), -1)


@functools.lru_cache(maxsize=256)
def plan(data, shape, *rest):
    return Plan(np.frombuffer(data).reshape(shape), *rest)


@functools.partial(jax.jit, static_argnums=2)
def convolve(x, coefficients, plan):
    dtype = x.dtype
    x = keep_layout(x).transpose(3, 4, 1, 2, 0)  # [channels, components, *space, batch]
    y = _layer(plan, x, coefficients[..., np.array([orbit[0] for orbit in plan.turn.target])])
    return keep_layout(y.astype(dtype).transpose(4, 2, 3, 0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(plan, x, base):
    matrices = plan.weights(base).astype(x.dtype)
    maps = _maps(_spectrum(x, plan.turn.source, plan.inputs, plan), plan.padding, (1, 1), plan.stencils, plan.strides)
    y = []
    for m in plan.outputs:
        rows = list(plan.rows(m, plan.inputs))
        entries = [(plan.terms.index((b, a) if conjugate else (a, b)), n, -1 if conjugate else 1, part)
                   for (a, b), n, conjugate, part in rows]
        y.append(_product(matrices, entries, _operand(maps, rows, plan), plan.real(m)))
    return _field(y, plan.turn.target, plan)


def _layer_forward(plan, x, base):
    return _layer(plan, x, base), (x, base)


def _layer_backward(plan, residuals, dy):
    x, base = residuals
    gamma, weights_pullback = jax.vjp(plan.weights, base)
    adjoint = gamma.swapaxes(3, 4).astype(x.dtype)
    size = next(iter(plan.stencils.values())).shape
    around = [(k - 1 - low, n + low - (out - 1) * s - 1) for k, n, out, (low, _), s in zip(
        size, x.shape[2:4], dy.shape[2:4], plan.padding, plan.strides, strict=True)]
    spectrum = _spectrum(dy.astype(x.dtype), plan.turn.target, plan.outputs, plan)
    maps = _maps(spectrum, around, plan.strides, {key: np.flip(s) for key, s in plan.stencils.items()}, (1, 1))
    x_spectrum = _spectrum(x, plan.turn.source, plan.inputs, plan)
    dx, dgamma = [], []
    for n in plan.inputs:
        rows = list(plan.rows(n, plan.outputs))
        operand = _operand(maps, rows, plan)
        dx.append(_product(adjoint, [(plan.terms.index((b, a)), n, -1, part) for (a, b), _, _, part in rows], operand,
                           plan.real(n)))
        dgamma.append(_weight_gradient(jnp.stack(x_spectrum[_parts(n, plan.inputs, plan)]), rows, operand, plan.real(n), plan))
    dx = _field(dx, plan.turn.source, plan)
    return dx.astype(x.dtype), weights_pullback(jnp.stack(dgamma, 2).astype(base.dtype))[0]


_layer.defvjp(_layer_forward, _layer_backward)


def _parts(n, frequencies, plan):
    """Where the real and the imaginary part of a frequency lie in a spectrum."""
    start = sum(1 if plan.real(k) else 2 for k in frequencies if k < n)
    return slice(start, start + (1 if plan.real(n) else 2))


def _spectrum(x, orbits, frequencies, plan):
    """[channels, components, *space, batch] -> for each part [channels · orbits, *space, batch], X_n = Σ_j x_j e^{-iθnj}.

    An image stands for a field of equal components."""
    if orbits is None:
        return [(plan.order * x[:, 0].astype(jnp.float32)).astype(x.dtype)]
    steps = [take(x, step, 1).reshape(-1, *x.shape[2:]).astype(jnp.float32) for step in zip(*orbits, strict=True)]
    waves = [np.exp(-2j * np.pi / plan.order * n * np.arange(plan.order)) for n in frequencies]
    return [_combine(part, steps).astype(x.dtype) for n, wave in zip(frequencies, waves, strict=True)
            for part in (wave.real, wave.imag)[:1 if plan.real(n) else 2]]


def _combine(weights, arrays):
    terms = (a if w == 1 else jax.lax.mul(a, jax.lax.full_like(a, w)) for w, a in zip(weights, arrays, strict=True)
             if abs(w) > 1e-12)
    return functools.reduce(jax.lax.add, terms)


def _field(spectrum, orbits, plan):
    """The inverse of :func:`_spectrum`, of a list of [parts, channels · orbits, *space, batch]."""
    if orbits is None:
        return spectrum[0].swapaxes(0, 1)
    fields = [None] * sum(map(len, orbits))
    for step, components in enumerate(zip(*orbits, strict=True)):
        waves = [(1 if plan.real(m) else 2) / plan.order * np.exp(2j * np.pi / plan.order * m * step) for m in plan.outputs]
        parts = [(w, y[p]) for wave, y in zip(waves, spectrum, strict=True)
                 for p, w in enumerate((wave.real, -wave.imag)[:len(y)])]
        y = _combine(*zip(*parts, strict=True))
        y = y.reshape(-1, len(orbits), *y.shape[1:])
        for k, component in enumerate(components):
            fields[component] = y[:, k]
    return jnp.stack(fields, 1)


def _maps(spectrum, padding, dilation, stencils, strides):
    """For each (r, f) the parts of the spectrum under the real and under the imaginary part of its stencil."""
    spectrum = [pad(part, padding, dilation) for part in spectrum]
    return {key: [[taps(part, np.where(np.abs(half) > 1e-12, half, 0), 1, strides).astype(part.dtype) for part in spectrum]
                  if np.abs(half).max() > 1e-12 else None for half in (s.real, s.imag)]
            for key, s in stencils.items()}


def _operand(maps, rows, plan):
    """Stacks the rows, some at a time: Re and Im of D^a D̄^b X, X the stored frequency or its conjugate."""
    stack = []
    for (a, b), n, conjugate, part in rows:
        where = _parts(n, plan.outputs, plan)
        real, imaginary = maps[a + b, abs(a - b)]
        x = [(1, where.start)] + [(-1 if conjugate else 1, where.start + 1)] * (where.stop - where.start - 1)
        signed = [(1, real, x[part:part + 1]), (1 if (a > b) == part else -1, imaginary, x[1 - part:2 - part])]
        terms = [(s * t, m[i].astype(jnp.float32)) for s, m, x in signed if m is not None for t, i in x]
        stack.append(_combine(*zip(*terms, strict=True)).astype(real[0].dtype))
    return [barrier(jnp.stack(stack[i:i + ROWS])) for i in range(0, len(stack), ROWS)]


def _product(matrices, entries, operand, real):
    """[parts, out, *space, batch] float32: the complex matrices Γ of ``entries`` (term, frequency, ± imaginary part, part).

    A real frequency counts each pair of conjugate terms, of which one is there, twice."""
    single = [sum(e[:2] == other[:2] for other in entries) == 1 for e in entries]
    blocks = matrices.reshape(-1, *matrices.shape[3:])
    count, frequencies = matrices.shape[1:3]
    index, sign = [], []
    for out in range(1 if real else 2):
        index.append([((out + part) % 2 * count + term) * frequencies + n for term, n, _, part in entries])
        sign.append([1 if part == out else s * (out - part) for _, _, s, part in entries])
    sign = np.array(sign) * np.where(np.array(single) | (not real), 1, 2)
    matrix = blocks[np.array(index)] * jnp.asarray(sign, blocks.dtype)[..., None, None]
    matrix = matrix.transpose(0, 2, 1, 3).reshape(len(index) * matrix.shape[2], -1)
    ends = np.cumsum([len(stack) * stack.shape[1] for stack in operand])
    y = sum(dot(barrier(matrix[:, end - len(stack) * stack.shape[1]:end]), flat(stack), ((1,), (0,)))
            for stack, end in zip(operand, ends, strict=True))
    return y.reshape(len(index), -1, *operand[0].shape[2:])


def _weight_gradient(x, rows, operand, real, plan):
    """dΓ [2, terms, out, in] of one input frequency, from the operand of its adjoint and X itself."""
    blocks = jnp.concatenate([dot(flat(stack), flat(x), ((1,), (1,))) for stack in operand])
    blocks = blocks.reshape(len(rows), -1, *x.shape[:2]).transpose(0, 2, 1, 3)
    blocks, parts, place = blocks.reshape(-1, *blocks.shape[2:]), len(x), {(t, p): i for i, (t, _, _, p) in enumerate(rows)}
    gradient = []
    for part, (a, b) in itertools.product(range(2), plan.terms):
        other, sign = ((b, a), 1) if ((b, a), 0) in place else ((a, b), -1)  # of two conjugates one is there
        picked = [(1, (other, part), 0), (1 if part == 0 else -1, (other, 1 - part), 1)][:parts]
        picked = [(s * (sign if part else 1), place[key] * parts + p) for s, key, p in picked if key in place]
        gradient.append(sum(s * blocks[i] for s, i in picked) if picked else jnp.zeros_like(blocks[0]))
    gradient = jnp.stack(gradient) * np.float32((1 if real else 2) / plan.order)
    return gradient.reshape(2, -1, *gradient.shape[1:])
