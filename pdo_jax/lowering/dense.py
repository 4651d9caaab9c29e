"""The "dense" lowering: expands the kernel and calls XLA's convolution, in any dimension."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pdo_jax.lowering.layout import around, replicated


def expand(coefficients: jax.Array, stencils: ArrayLike) -> jax.Array:
    """The dense kernel [k, …, k, channels · components, features · out components] of a layer."""
    kernel = jnp.tensordot(jnp.asarray(stencils, coefficients.dtype), coefficients, ((0,), (0,)))
    *size, channels, components, features, out = kernel.shape
    return kernel.reshape(*size, channels * components, features * out)


class Dense:
    def __init__(self, layer: Any):
        self.layer, self.dim = layer, len(layer.strides)

    def output(self, x: jax.Array, w: jax.Array) -> jax.Array:
        layer, kernel = self.layer, self.layer.kernel(w).astype(x.dtype)
        y = jax.lax.conv_general_dilated(_flat(x), kernel, layer.strides, layer.padding, rhs_dilation=layer.dilation,
                                         dimension_numbers=_numbers(self.dim))
        return y.reshape(*y.shape[:-1], *self.layer.outputs)

    def input(self, w: jax.Array, g: jax.Array) -> jax.Array:
        layer, dim = self.layer, self.dim
        kernel = jnp.flip(layer.kernel(w), range(dim)).swapaxes(-1, -2).astype(g.dtype)
        edges = around(layer.size, layer.space, g.shape[1:-2], layer.padding, layer.strides)
        x = jax.lax.conv_general_dilated(_flat(g), kernel, [1] * dim, edges, lhs_dilation=layer.strides,
                                         rhs_dilation=layer.dilation, dimension_numbers=_numbers(dim))
        return x.reshape(*x.shape[:-1], *layer.inputs)

    def weight(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """The correlation of x with g, summed over the batch, which takes the place of the channels."""
        layer, dim = self.layer, self.dim
        padding = [(low, k + (out - 1) * s - n - low) for k, n, out, s, (low, _) in zip(
            layer.size, layer.space, g.shape[1:-2], layer.strides, layer.padding, strict=True)]
        by_batch = (dim + 1, 0, *range(1, dim + 1))
        numbers = jax.lax.ConvDimensionNumbers(by_batch, by_batch, (dim, dim + 1, *range(dim)))
        kernel = jax.lax.conv_general_dilated(_flat(x), _flat(g), layer.dilation, padding, rhs_dilation=layer.strides,
                                              dimension_numbers=numbers, **replicated(x, [0]))
        return layer.pull_back_kernel(kernel)


def _flat(x):
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _numbers(dim):
    last = (0, dim + 1, *range(1, dim + 1))  # channels last
    return jax.lax.ConvDimensionNumbers(last, (dim + 1, dim, *range(dim)), last)
