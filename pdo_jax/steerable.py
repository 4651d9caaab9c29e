"""All equivariant differential operators between two fields.

A matrix of operators H(∇) = Σ_α H_α ∂^α maps fields of type ρ_in to fields of type ρ_out and commutes with the group when

    ρ_out(A) H(A^{-1}∇) ρ_in(A)^{-1} = H(∇)    for all A

(Jenner & Weiler, Steerable Partial Differential Operators for Equivariant Neural Networks, ICLR 2022). The solutions are the
range of the average of the left side over the group. Lifting (trivial -> regular) and group convolution (regular -> regular)
are special cases; gradient, divergence, Laplacian and curl appear by themselves.
"""

import functools
import math

import numpy as np

from pdo_jax.fields import Representation, orthonormal_range, permutes
from pdo_jax.operators import action, multi_indices


@functools.lru_cache(maxsize=16)
def basis(in_rep: Representation, out_rep: Representation, order: int) -> np.ndarray:
    """A basis of the equivariant operators from ``in_rep`` to ``out_rep`` up to an order.

    The basis is orthonormal in the inner product Σ_α (α! / |α|!) tr(H_α H'_αᵀ), the one that turning an operator preserves.
    Every element has a single degree (they rise along the basis) and stays within one pair of blocks of the two
    representations; between permutation-like blocks it lives on one orbit of pairs of entries, which for regular -> regular
    is one operator ∂^α for one relative element, as in a group convolution. The result is cached, and to rounding the same on
    every machine.

    Args:
      in_rep, out_rep: representations of one group.
      order: the highest degree of operators.

    Returns:
      [n_basis, n_operators, d_out, d_in] float64, read-only; operators as in ``operators.multi_indices(dim, order)``.

    Raises:
      ValueError: the groups differ, or the order is negative.

    >>> from pdo_jax import fields, groups
    >>> plane = groups.cyclic(6)
    >>> scalar, vector = fields.trivial(plane), fields.standard(plane)
    >>> basis(scalar, scalar, 2)[:, :, 0, 0].round(3)  # the identity and the Laplacian
    array([[1.   , 0.   , 0.   , 0.   , 0.   , 0.   ],
           [0.   , 0.   , 0.   , 0.707, 0.   , 0.707]])
    >>> basis(scalar, vector, 1)[:, 1:, :, 0].round(3)  # d_0 and d_1: the gradient, and the gradient turned by 90 degrees
    array([[[ 0.707,  0.   ],
            [ 0.   ,  0.707]],
    <BLANKLINE>
           [[ 0.   ,  0.707],
            [-0.707,  0.   ]]])
    """
    if in_rep.group != out_rep.group:
        raise ValueError(f"operators need two representations of one group, got in_rep={in_rep!r} and out_rep={out_rep!r}")
    group = in_rep.group
    indices = multi_indices(group.dim, order)
    degrees = np.array([sum(a) for a in indices])
    norms = np.sqrt([math.prod(map(math.factorial, a)) / math.factorial(sum(a)) for a in indices])
    turn = action(group.elements, order) * norms / norms[:, None]  # orthogonal, on coefficients times norms
    inverse = in_rep.matrices[group.inverse]
    found = []
    for degree in range(order + 1):
        at = np.flatnonzero(degrees == degree)
        for rows in out_rep.blocks:
            for columns in in_rep.blocks:
                out, into = out_rep.matrices[:, rows][:, :, rows], inverse[:, columns][:, :, columns]
                solve = orbit_solutions if permutes(out) and permutes(into) else average_solutions
                found.append((np.ix_(at, rows, columns), solve(turn[:, at][:, :, at], out, into)))
    result = np.zeros((sum(len(h) for _, h in found), len(indices), out_rep.dim, in_rep.dim))
    start = 0
    for place, h in found:
        result[start:start + len(h)][(slice(None), *place)] = h
        start += len(h)
    result /= norms[:, None, None]
    result.setflags(write=False)
    return result


def average_solutions(turn: np.ndarray, out: np.ndarray, into: np.ndarray) -> np.ndarray:
    """The solutions for any matrices: random operators u p(∇) v, averaged over the group.

    Args:
      turn: [order, k, k] orthogonal, by which the group acts on rows of coefficients.
      out: [order, d_out, d_out], ρ_out(A).
      into: [order, d_in, d_in], ρ_in(A)^{-1}.

    Returns:
      [n, k, d_out, d_in], orthonormal; n is the trace of the average, from the characters.
    """
    characters = [np.trace(m, axis1=1, axis2=2) for m in (turn, out, into)]
    count = round(float(np.prod(characters, 0).mean()))
    size = (count, turn.shape[1], out.shape[1], into.shape[1])
    random = np.random.default_rng(0)
    p, u, v = (random.normal(size=(count, 1, 1, k)) for k in size[1:])  # operators u p(∇) v, for every A below: [n, A, k]
    p, u, v = (p @ turn)[:, :, 0], (u @ np.swapaxes(out, 1, 2))[:, :, 0], (v @ into)[:, :, 0]
    left = (p[..., None] * u[..., None, :]).reshape(count, len(turn), size[1] * size[2])
    h, triangle = np.linalg.qr((np.swapaxes(left, 1, 2) @ v).reshape(count, math.prod(size[1:])).T)
    scale = np.abs(triangle.diagonal())
    if count and scale.min() < 1e-8 * scale.max():
        raise ArithmeticError(f"{count} random operators of size {size[1:]} span the equivariant ones too poorly for float64")
    h = orthonormal_range(h.T, count).T @ h.T
    return np.where(np.abs(h) < 1e-13, 0.0, h).reshape(size)


def orbit_solutions(turn: np.ndarray, out: np.ndarray, into: np.ndarray) -> np.ndarray:
    """The same for permutations: H_{Ai,Aj} = p(A^{-1}∇), with p for one pair (i, j) of each orbit, kept by its stabiliser."""
    image = out.argmax(1)[:, :, None] * into.shape[1] + into.argmax(2)[:, None, :]  # [A, i, j] -> number of the pair (Ai, Aj)
    result = []
    for pair in np.unique(image.min(0)):
        orbit = image[(slice(None), *divmod(pair, into.shape[1]))]
        kept = turn[orbit == pair].mean(0)  # a projector
        p = orthonormal_range(kept, round(np.trace(kept))).T
        h = np.zeros((len(p), turn.shape[1], out.shape[1] * into.shape[1]))
        h[:, :, orbit] = np.moveaxis(p @ turn, 0, 2) * math.sqrt((orbit == pair).sum() / len(turn))
        result.append(h.reshape(*h.shape[:2], out.shape[1], into.shape[1]))
    return np.concatenate(result)
