"""From parameters to equivariant layers: the operator bank of a group, and the coefficients of its layers.

An orbit layer learns base polynomials p = Σ_j w_j q_j(∇) and turns them by the group S:

    lifting            (Ψf)(x, A) = p(A^{-1}∇) f (x)
    group convolution  (ΦF)(x, A) = Σ_{C ∈ S} p_{A^{-1}C}(A^{-1}∇) F(·, C) (x),

one polynomial for every relative element A^{-1}C (Shen, He, Lin, Ma, ICML 2020, Eqs. 8 and 12, restated over the input
element C). An extra frame F turns the base polynomials before the group acts: A is replaced by AF in p(A^{-1}∇).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from pdo_jax import operators, stencils
from pdo_jax.groups import Group


@dataclasses.dataclass(frozen=True, eq=False)
class Bank:
    """The turned operators of a layer and their stencils; made by :func:`bank`.

    Attributes:
      indices: the multi-indices of all operators that the turned ones need, n of them.
      stencils: [n, k, …, k] float64.
      turned: [order, parameters, n] float64; row j of ``turned[a]`` holds the coefficients of q_j(A^{-1}∇).
      square: [order] Σ over parameters and pixels of the squared kernels, of each orientation.
      constant: [order] Σ over parameters of the squared response to a constant 1, of each orientation.
    """

    indices: tuple[operators.MultiIndex, ...]
    stencils: np.ndarray
    turned: np.ndarray
    square: np.ndarray
    constant: np.ndarray

    def energy(self, rectified: bool = True) -> np.ndarray:
        """[order] mean square response to noise of mean square 1, for standard-normal parameters and each orientation.

        Noise that went through a ReLU has the second moments E[x x^T] = (1 - 1/π) 1 + (1/π) 11^T; else it is white.
        """
        share = rectified / math.pi
        return (1 - share) * self.square + share * self.constant

    def scale(self, fan_in: int, rectified: bool = True) -> float:
        """The standard deviation of normal parameters under which a response to noise of variance 1 has variance 1.

        A rectified input has lost half its mean square (He et al. 2015): sqrt(2 / (fan_in · mean energy)).
        """
        return math.sqrt((2 if rectified else 1) / (fan_in * self.energy(rectified).mean()))


def bank(group: Group, kernel_size: int | Sequence[int] = 5, basis: str | int = "paper",
         scheme: stencils.Scheme = stencils.central_difference, frame: ArrayLike = 0.0,
         spacing: Sequence[float] | None = None) -> Bank:
    """The operator bank of a group.

    Where the base operators span all kernels of a smaller box (the paper's nine: 3×3), the parameters w are those pixels,
    c = w S^{-1}, as in the reference implementation. Elsewhere c = w G^{-1/2}, where G is the Gram matrix of the stencils
    of the base operators, averaged over the group: then |w| is the mean norm of the kernels.

    At initialisation (:meth:`Bank.scale`) activations keep their variance, on average over orientations. A single
    orientation departs from it where the base operators are not closed under the group: ``energy()`` of the paper's nine
    spreads (largest over smallest) by 1.00 for p4 and for p8 with frame π/8, 1.48 for p6 and p12, 1.80 for p8. For all
    operators up to an order it is the same for every orientation.

    Args:
      group: the group S.
      kernel_size: odd number of points along each axis, one for all or one each.
      basis: "paper" (at most 2 derivatives along an axis, the least kernel_size - 1 in all) or an int (all operators up to it).
      scheme: the discretisation, a function of pdo_jax.stencils or one like them.
      frame: an angle in radians (in the plane) or an orthogonal matrix.
      spacing: of the grid, for each axis, by default 1.

    Raises:
      ValueError: an even or too small size, an unknown basis, a frame that does not fit the group's dimension.
    """
    if basis != "paper" and (isinstance(basis, bool) or not isinstance(basis, Integral) or basis < 0):
        raise ValueError(f'basis must be "paper" or an int >= 0 (all operators up to that order), got {basis!r}')
    if not isinstance(group, Group):
        raise ValueError(f"group must be a Group, such as pdo_jax.groups.cyclic(8), got {group!r}")
    frame = tuple(map(tuple, frame_matrix(frame, group.dim).tolist()))
    sizes, spacing = stencils.axes_of("kernel_size", kernel_size, group.dim), None if spacing is None else tuple(spacing)
    return _bank(group, sizes, basis if basis == "paper" else int(basis), stencils.same(scheme), frame, spacing)


def frame_matrix(frame: ArrayLike, dim: int) -> np.ndarray:
    """The frame as a dim×dim matrix: an angle t stands for the rotation that turns axis 0 towards axis 1 by t radians."""
    frame = np.asarray(frame, np.float64)
    if frame.ndim == 0:
        if not np.isfinite(frame):
            raise ValueError(f"frame must be finite, got {frame}")
        if abs(frame) > 2 * math.pi:
            raise ValueError(f"frame is an angle in radians, from -2π to 2π, got {frame}: from degrees math.radians({frame})")
        if frame == 0:
            return np.eye(dim)
        if dim != 2:
            raise ValueError(f"a frame in radians turns the plane; for dimension {dim} give an orthogonal matrix, got {frame}")
        c, s = math.cos(frame), math.sin(frame)
        return np.array([[c, -s], [s, c]])
    if frame.shape != (dim, dim) or not np.allclose(frame @ frame.T, np.eye(dim), atol=1e-6):
        raise ValueError(f"frame must be an angle or an orthogonal {dim}×{dim} matrix, got {frame.tolist()}")
    return frame


@functools.lru_cache(maxsize=128)
def _bank(group, sizes, basis, scheme, frame, spacing):
    dim = group.dim
    base = operators.paper_basis(dim, min(sizes)) if basis == "paper" else operators.multi_indices(dim, basis)
    order = max(map(sum, base))
    indices = operators.multi_indices(dim, order)
    grids = stencils.bank(indices, sizes, scheme, spacing)
    rows = [indices.index(a) for a in base]
    action = operators.action(group.elements @ np.array(frame), order)[:, rows]  # [order, base, n]
    turned = _coordinates(grids[rows], action @ grids.reshape(len(indices), -1)) @ action
    kernels = turned @ grids.reshape(len(indices), -1)  # [order, parameters, pixels]
    return Bank(indices, grids, turned, (kernels**2).sum((1, 2)), (kernels.sum(2) ** 2).sum(1))


def _coordinates(grids, turned):
    """[parameters, base operators]: the coefficients of the base polynomial for each parameter."""
    box = np.argwhere(np.abs(grids).max(0) > 1e-12)
    pixels = grids[(slice(None), *map(slice, box.min(0), box.max(0) + 1))].reshape(len(grids), -1)
    gram = np.mean(turned @ turned.swapaxes(1, 2), 0)
    values, vectors = np.linalg.eigh(gram)
    if values[0] < 1e-12 * values[-1]:
        raise ValueError(f"the {len(grids)} stencils are linearly dependent on {grids.shape[1:]} points: use a larger "
                         "kernel_size or a lower order")
    if len(pixels) == pixels.shape[1]:
        return np.linalg.inv(pixels)
    return vectors / np.sqrt(values) @ vectors.T


@dataclasses.dataclass(frozen=True, repr=False)  # jax prints the functions that it traces: arrays take it long
class Coefficients:
    """The coefficients of a layer as a function of its parameters and of the output components A that are wanted.

    [parameters, channels, components, features] -> [n, channels, components, features, wanted]: of p(A^{-1}∇) for lifting
    (no ``group``, one input component), of p_{A^{-1}C}(A^{-1}∇) for a group convolution, where axis 2 of the parameters is
    the relative element A^{-1}C and that of the result is C.
    """

    bank: Bank
    group: Group | None = None

    @property
    def stencils(self) -> np.ndarray:
        return self.bank.stencils

    @property
    def indices(self) -> tuple[operators.MultiIndex, ...]:
        return self.bank.indices

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def __call__(self, w: jax.Array, wanted: tuple[int, ...] | None = None) -> jax.Array:
        turned, relative = self._turned(wanted, w.dtype)
        if self.group is None:
            return jnp.einsum("picf,apn->nicfa", w, turned)
        c = jnp.einsum("picf,apn->nifac", w, turned)  # c is the relative element
        return _permuted(c, relative).transpose(0, 1, 4, 2, 3)

    @functools.partial(jax.jit, static_argnums=(0, 2, 3))
    def transpose(self, c: jax.Array, shape: tuple[int, ...], wanted: tuple[int, ...] | None = None) -> jax.Array:
        """The transpose, from coefficients to parameters of this shape: a permutation again, where JAX would scatter."""
        turned, relative = self._turned(wanted, c.dtype)
        if self.group is None:
            return jnp.einsum("nicfa,apn->picf", c, turned)
        return jnp.einsum("nifac,apn->picf", _permuted(c.transpose(0, 1, 3, 4, 2), np.argsort(relative, 1)), turned)

    def _turned(self, wanted, dtype):
        """[wanted, parameters, n], and for a group convolution [wanted, order], the relative elements A^{-1}C."""
        wanted = np.arange(len(self.bank.turned)) if wanted is None else np.array(wanted)
        relative = self.group and self.group.table[self.group.inverse[wanted]]
        return jnp.asarray(self.bank.turned[wanted], dtype), relative


def _permuted(x, rows):
    """x[…, a, c] -> x[…, a, rows[a, c]]"""
    if (rows == np.arange(rows.shape[1])).all():
        return x
    flat = np.arange(len(rows))[:, None] * rows.shape[1] + rows
    return jnp.take(x.reshape(*x.shape[:-2], -1), flat.reshape(-1), axis=-1, unique_indices=True).reshape(x.shape)


def product(mix: jax.Array, kernel: jax.Array) -> jax.Array:
    """Σ_r a_r b_r, [channels, components, r], [parameters, r, features] -> [parameters, channels, components, features]."""
    return jnp.einsum("icr,prf->picf", mix, kernel)


def factor(kernel: ArrayLike, rank: int) -> tuple[jax.Array, jax.Array]:
    """The mix and kernel of this rank whose :func:`product` is closest to a kernel, in the sum of squares (Eckart, Young 1936).

    [parameters, channels, components, features] -> [channels, components, rank], [parameters, rank, features].
    """
    parameters, channels, components, features = jnp.shape(kernel)
    matrix = jnp.transpose(kernel, (1, 2, 0, 3)).reshape(channels * components, parameters * features)
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank])
    return ((left[:, :rank] * root).reshape(channels, components, rank),
            (root[:, None] * right[:rank]).reshape(rank, parameters, features).swapaxes(0, 1))


def factored(params: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a network for the same network with ranks (see :class:`pdo_jax.GroupConv`), each kernel by :func:`factor`.

    Args:
      params: of the network without ranks; like: those with ranks, or their shapes, else a ValueError.

    >>> import pdo_jax as pdo
    >>> layer, x = pdo.GroupConv(8, pdo.groups.cyclic(8)), jnp.ones([1, 9, 9, 8, 8])
    >>> whole, small = layer.init(jax.random.key(0), x), layer.clone(rank=10)
    >>> params = factored(whole["params"], jax.eval_shape(small.init, jax.random.key(0), x)["params"])
    >>> {name: leaf.shape for name, leaf in params.items()}
    {'kernel': (9, 10, 8), 'mix': (8, 8, 10)}
    """
    params = dict(params)
    if "mix" in like and "kernel" in params and "mix" not in params:
        params["mix"], params["kernel"] = factor(params["kernel"], like["mix"].shape[-1])
    for name in {**params, **like}:
        here, there = (tree.get(name) for tree in (params, like))
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            params[name] = factored(here, there)
        elif (shapes := [getattr(leaf, "shape", None) for leaf in (here, there)])[0] != shapes[1]:
            raise ValueError(f"{name} has shape {shapes[0]} here, {shapes[1]} in the network with ranks; all else must agree")
    return params
