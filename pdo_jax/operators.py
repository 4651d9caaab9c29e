"""Differential operators with constant coefficients, and how an orthogonal matrix acts on them.

An operator of order K is p(∇) = Σ_{|α| ≤ K} c_α ∂^α, held as the row of its coefficients c over the multi-indices of
:func:`multi_indices`. Turning it by A, (π_A f)(x) = f(A^{-1}x), gives π_A p(∇) π_A^{-1} = p(A^{-1}∇): substitute
∂_i -> Σ_j A_{ji} ∂_j and expand. On coefficients this is the matrix T(A) of :func:`action`.
"""

import functools
import itertools

import numpy as np
from numpy.typing import ArrayLike

MultiIndex = tuple[int, ...]


@functools.lru_cache
def multi_indices(dim: int, order: int) -> tuple[MultiIndex, ...]:
    """All multi-indices α of ``dim`` entries with |α| <= order, by degree, then with the first axes' powers falling.

    >>> multi_indices(2, 2)
    ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))
    """
    if dim < 1 or order < 0:
        raise ValueError(f"multi_indices needs dim >= 1 and order >= 0, got dim={dim}, order={order}")
    powers = itertools.product(range(order, -1, -1), repeat=dim)
    return tuple(sorted((a for a in powers if sum(a) <= order), key=sum))


def paper_basis(dim: int, kernel_size: int) -> tuple[MultiIndex, ...]:
    """The paper's operators: at most 2 derivatives along an axis and kernel_size - 1 in all (nine on 5×5, six on 3×3)."""
    return tuple(a for a in multi_indices(dim, min(kernel_size - 1, 2 * dim)) if max(a) <= 2)


def action(matrices: ArrayLike, order: int) -> np.ndarray:
    """T(A), the matrices by which orthogonal A act on the coefficients of operators up to an order.

    Row α of T(A) holds the coefficients of Π_i (Σ_j A_{ji} ∂_j)^{α_i}, so that p(A^{-1}∇) has the coefficients c T(A).
    T is block diagonal over the degree |α|, T(1) = 1, and T(AB) = T(B) T(A).

    Args:
      matrices: [..., dim, dim].
      order: the largest degree.

    Returns:
      [..., n, n] float64, n the number of multi-indices.

    >>> action([[0, -1], [1, 0]], 1)  # a quarter turn: d_0 -> d_1, d_1 -> -d_0
    array([[ 1.,  0.,  0.],
           [ 0.,  0.,  1.],
           [ 0., -1.,  0.]])
    """
    matrices = np.asarray(matrices, np.float64)
    dim = matrices.shape[-1]
    indices = multi_indices(dim, order)
    position = {a: k for k, a in enumerate(indices)}
    t = np.zeros((*matrices.shape[:-2], len(indices), len(indices)))
    t[..., 0, 0] = 1.0
    for row, alpha in enumerate(indices[1:], 1):  # ∂^α = ∂_i ∂^(α - e_i): multiply an earlier row by the turned ∂_i
        i = next(k for k, power in enumerate(alpha) if power)
        earlier = t[..., position[_shift(alpha, i, -1)], :]
        for j in range(dim):
            for column, beta in enumerate(indices):
                if sum(beta) == sum(alpha) - 1:
                    t[..., row, position[_shift(beta, j, 1)]] += matrices[..., j, i] * earlier[..., column]
    return t + 0.0


def _shift(alpha, axis, by):
    return (*alpha[:axis], alpha[axis] + by, *alpha[axis + 1:])
