"""The "matmul" lowering: inner factors of the stencils, one matrix product over the channels, outer factors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pdo_jax.layout import barrier, dot, flat, hold, pad, restore, take, taps, view


class Plan:
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
        self.mix, self.used = mix[used.any(1)][:, used.any(0)], used[used.any(1)][:, used.any(0)]
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

    def products(self, rows, results):
        """A class as two products, of the first and of the last inner factors, where that leaves out more of the zero blocks:
        derivatives of high order along both axes."""
        reach = [len(self.used) - self.used[::-1, a:].any(1).argmax() for a in range(self.used.shape[1])]
        a = min(range(len(reach)), key=lambda a: a * len(self.used) + (len(reach) - a) * reach[a])
        halves = (([r for r in rows if r[0] < a], results),
                  ([r for r in rows if r[0] >= a], [r for r in results if r[0] < reach[a]]))
        return [half for half in halves if all(half)]


@functools.lru_cache(maxsize=256)
def plan(data, shape, *rest):
    return Plan(np.frombuffer(data).reshape(shape), *rest)


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
def convolve(x, coefficients, plan):
    """``coefficients`` are those of ``plan.fold.target[0]`` alone where the plan folds."""
    x, dtype, fold = hold(view(x)), x.dtype, plan.fold
    parts, kernels = [x], [coefficients]
    if fold and fold.source:
        x1, x2 = (take(x, s, 0) for s in fold.source)
        c1, c2 = (take(coefficients, s, 2) for s in fold.source)
        parts, kernels = [x1 + x2, x1 - x2], [(c1 + c2) / 2, (c1 - c2) / 2]
    n, _, _, features, out = coefficients.shape
    kernels = [k.transpose(0, 4, 3, 2, 1).reshape(n, out * features, -1) for k in kernels]
    blocks = tuple(jnp.tensordot(jnp.asarray(plan.mix, k.dtype), k, 1).astype(dtype) for k in kernels)
    y = _pipeline(plan, tuple(p.reshape(-1, *p.shape[2:]) for p in parts), blocks)
    y = [p.reshape(out, features, *p.shape[1:]) for p in y]
    if fold:
        y = [take(jnp.concatenate([y[0] + y[1], y[0] - y[1]]), np.argsort([*fold.target[0], *fold.target[1]]), 0)]
    return restore(hold(y[0].astype(dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pipeline(plan, parts, blocks):
    return _forward(plan, parts, blocks)


@functools.partial(jax.jit, static_argnums=0)
def _forward(plan, parts, blocks):
    """Parts [rows, *space, batch] and blocks [outer, inner, out rows, rows] -> output parts [out rows, *space', batch]."""
    dim, split = len(plan.strides), plan.outer_axes
    x = [pad(p, plan.padding, [1] * dim) for p in parts]
    y = [0] * plan.out_parts
    for whole in plan.classes(len(parts), plan.out_parts):
        # a second product is a second pass over memory: in bfloat16, which is multiplied faster, that costs more than it saves
        for rows, results in plan.products(*whole) if x[0].dtype.itemsize > 2 else [whole]:
            v = _stack(x, plan.inner, rows, 1 + split, plan.strides[split:])
            z = _product([[blocks[part][b, a] for a, part in rows] for b, _ in results], v)
            for zb, (b, part) in zip(z, results, strict=True):
                y[part] += taps(zb, plan.outer[b], 1, plan.strides[:split])
    return tuple(y)


def _pipeline_forward(plan, parts, blocks):
    return _forward(plan, parts, blocks), (parts, blocks)


@functools.partial(jax.jit, static_argnums=0)
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
    dy = [pad(d.astype(dtype), around, plan.strides) for d in cotangents]
    x = [pad(p, [(r, r) for r in reach[:split]] + [(0, 0)] * (dim - split), [1] * dim) for p in parts]
    inner, outer = [np.flip(s) for s in plan.inner], [np.flip(s) for s in plan.outer]
    dparts, dblocks = [0] * len(parts), [[[None] * len(inner) for _ in outer] for _ in parts]
    for rows, results in plan.classes(len(dy), len(parts)):
        u = _stack(dy, inner, rows, 1 + split, [1] * (dim - split))
        z = _product([[blocks[part][b, a].T for a, _ in rows] for b, part in results], u)
        for zb, (b, part) in zip(z, results, strict=True):
            dparts[part] += taps(zb, outer[b], 1, [1] * split)
        if split:
            t = _stack(x, plan.outer, results, 1, [1] * split)
            gradient = dot(flat(u), flat(t), ((1,), (1,))).reshape(*u.shape[:2], *t.shape[:2])
            for (k, (a, _)), (j, (b, part)) in itertools.product(enumerate(rows), enumerate(results)):
                dblocks[part][b][a] = gradient[k, :, j]
    if not split:  # the other way round, with few inputs: the inner factors act on x, and the cotangent stays as it is
        x = [pad(p, plan.padding, [1] * dim) for p in parts]
        for rows, results in plan.classes(len(parts), len(dy)):
            v = _stack(x, plan.inner, rows, 1, plan.strides)
            for b, part in results:
                gradient = dot(flat(cotangents[part].astype(dtype)[None]), flat(v), ((1,), (1,))).reshape(-1, *v.shape[:2])
                for k, (a, source) in enumerate(rows):
                    dblocks[source][b][a] = gradient[:, k]
    zero = jnp.zeros(blocks[0].shape[2:], jnp.float32)
    dblocks = tuple(jnp.stack([jnp.stack([zero if g is None else g for g in row]) for row in part]) for part in dblocks)
    return tuple(d.astype(dtype) for d in dparts), tuple(d.astype(dtype) for d in dblocks)


_pipeline.defvjp(_pipeline_forward, _pipeline_backward)


def _stack(parts, factors, rows, axis, strides):
    """[len(rows), rows, *space, batch]: each (factor, part) correlated along the axes from ``axis``."""
    return barrier(jnp.stack([taps(parts[part], factors[i], axis, strides).astype(parts[0].dtype) for i, part in rows]))


def _product(blocks, v):
    """The matrix of blocks [results][rows] times the stack v, [results, out rows, *space, batch] float32."""
    matrix = barrier(jnp.concatenate([jnp.concatenate(row, 1) for row in blocks]))  # a transpose left in it makes it slow
    z = dot(matrix, v.reshape(matrix.shape[1], -1), ((1,), (0,)))
    return z.reshape(len(blocks), -1, *v.shape[2:])
