"""A factor for each channel of a field, and its adjoint, the sum over all else: what a norm is made of.

``scale(x, factor)`` is bilinear, and ``inner(x, y)`` the third function of its form (:mod:`pdo_jax.lowering.bilinear`), so that
sums over a field are computed in the same way forwards and in every derivative. On a CPU such a sum is one over components,
which fuses with what it sums, and then a matrix product over the channels; elsewhere it is XLA's.
"""

import jax
import jax.numpy as jnp

from pdo_jax.lowering import bilinear
from pdo_jax.lowering.layout import is_portable, on_platform, replicated, restore, view


def scale(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x [batch, *space, channels, d] times factor [channels]."""
    return _scale(x, factor) if is_portable() else bilinear.apply(_FORM, x, factor)


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """[channels]: the sum of x · y over batch, space and d."""
    return _inner(x, y) if is_portable() else bilinear.apply(_FORM, x, y, bilinear.WEIGHT)


def along(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values [channels] with the axes of a field, for what is not differentiated or has no sum in its derivative."""
    return values.reshape(*[1] * (x.ndim - 2), -1, 1)


def _scale(x, factor):
    return x * along(factor, x)


def _scale_in_view(x, factor):
    return restore(view(x) * factor.reshape(1, -1, *[1] * (x.ndim - 2)))


def _inner(x, y):
    product = x * y
    return product.sum((*range(product.ndim - 2), product.ndim - 1))


def _inner_in_view(x, y):
    product = view(x * y).sum(0)
    over = tuple(range(1, product.ndim))
    ones = jnp.ones(product.shape[1:], product.dtype)
    return jax.lax.dot_general(product, ones, ((over, tuple(range(len(over)))), ((), ())), **replicated(product, over))


_OUTPUT = jax.jit(lambda x, factor: on_platform(_scale_in_view, _scale)(x, factor))
_FORM = bilinear.Form(
    input=jax.jit(lambda factor, g: _OUTPUT(g, factor)),
    weight=jax.jit(lambda x, g: on_platform(_inner_in_view, _inner)(x, g)),
    output=_OUTPUT,
    alone=_OUTPUT,
)
