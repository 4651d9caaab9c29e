"""The coefficients of operators between fields of any two representations, as a function of a layer's parameters."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pdo_jax import lowering, operators, steerable, stencils
from pdo_jax.fields import Representation
from pdo_jax.lowering.layout import merge, take


class SteerableCoefficients:
    """The basis of :func:`steerable.basis`, mixed until the kernels that it makes are orthonormal, and the stencils; as a
    function, as :class:`kernels.Coefficients`, of parameters [basis, channels, features].

    Between permuted fields an element of the basis lives on one orbit of pairs (out, in) of components, so most of the basis is
    0. It is held as ``blocks`` [blocks, elements, operators, pairs], of the ``elements`` [blocks · elements] and the ``pairs``
    [blocks · pairs] that belong together, padded with one element and one pair more than there are; a basis that mixes all is
    one block."""

    indices: tuple[operators.MultiIndex, ...]
    blocks: np.ndarray
    elements: np.ndarray
    pairs: np.ndarray
    count: int
    components: tuple[int, ...]

    def __init__(self, in_rep: Representation, out_rep: Representation, order: int, sizes: tuple[int, ...],
                 scheme: stencils.Scheme, spacing: tuple[float, ...] | None):
        basis = steerable.basis(in_rep, out_rep, order)
        if not len(basis):
            raise ValueError(f"there is no equivariant operator up to order {order} from {in_rep!r} to {out_rep!r}")
        self.indices = operators.multi_indices(in_rep.group.dim, order)
        self.stencils: np.ndarray = stencils.bank(self.indices, sizes, scheme, spacing)
        self.count, self.components = len(basis), basis.shape[2:]
        basis = basis.reshape(*basis.shape[:2], -1)
        found = list(_blocks((basis != 0).any(1)))
        most, pairs = (max(len(group) for group in groups) for groups in zip(*found, strict=True))
        self.elements, self.pairs = (np.full((len(found), size), pad) for size, pad in (
            (most, self.count), (pairs, basis.shape[2])))
        self.blocks = np.zeros((len(found), most, len(self.indices), pairs))
        flat = self.stencils.reshape(len(self.indices), -1)
        for k, (mine, ours) in enumerate(found):
            block = basis[mine][:, :, ours]
            gram = np.tensordot(block, np.tensordot(flat @ flat.T, block, ((1,), (1,))), ((1, 2), (0, 2)))
            values, vectors = np.linalg.eigh(gram)
            self.blocks[k, :len(mine), :, :len(ours)] = np.tensordot(vectors / np.sqrt(values) @ vectors.T, block, 1)
            self.elements[k, :len(mine)], self.pairs[k, :len(ours)] = mine, ours

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def __call__(self, w: jax.Array, wanted: tuple[int, ...] | None = None) -> jax.Array:
        blocks = jnp.asarray(self.blocks, w.dtype)
        c = jnp.einsum("jkif,jknp->njpif", _taken(w, self.elements, 0), blocks)
        c = _taken(merge(c, 1), _places(self.pairs, math.prod(self.components)), 1)  # [n, out · in, i, f]
        c = c.reshape(len(c), *self.components, *c.shape[2:]).transpose(0, 3, 2, 4, 1)
        return c if wanted is None else take(c, wanted, -1)

    @functools.partial(jax.jit, static_argnums=(0, 2, 3))
    def transpose(self, c: jax.Array, shape: tuple[int, ...], wanted: tuple[int, ...] | None = None) -> jax.Array:
        if wanted is not None:
            c = lowering.GIVEN.transpose(c, (*c.shape[:-1], self.components[0]), wanted)
        c = merge(c.transpose(0, 4, 2, 1, 3), 1)
        w = jnp.einsum("njpif,jknp->jkif", _taken(c, self.pairs, 1), jnp.asarray(self.blocks, c.dtype))
        return _taken(merge(w), _places(self.elements, self.count), 0)


def _blocks(support):
    """The finest split of the rows and columns of a boolean matrix such that it is 0 between different parts."""
    column = np.arange(support.shape[1])
    while True:
        row = np.where(support, column, support.shape[1]).min(1)
        new = np.minimum(column, np.where(support, row[:, None], support.shape[1]).min(0))
        if (new == column).all():
            return [(np.flatnonzero(row == k), np.flatnonzero(column == k)) for k in np.unique(row)]
        column = new


def _places(index, size):
    """Where each number below ``size`` stands in an index; one behind its end for those that it lacks."""
    places = np.full(size + 1, index.size)
    places[index.reshape(-1)] = np.arange(index.size)
    return places[:size]


def _taken(x, index, axis):
    """The entries of an axis in the shape of an index; an index one behind its end gives 0."""
    size, flat = x.shape[axis], index.reshape(-1)
    if (flat == size).any():
        x = jnp.concatenate([x, jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))], axis)
    x = x if flat.size == x.shape[axis] and (flat == np.arange(flat.size)).all() else jnp.take(x, flat, axis=axis)
    return x.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1:])


coefficients_of = functools.lru_cache(maxsize=16)(SteerableCoefficients)
