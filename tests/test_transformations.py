"""Every layer and function of fields, under every transformation and mode of JAX."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from table import ALL, items

EVERY = pytest.mark.parametrize("dim, name", ALL, ids=lambda v: str(v))


@functools.lru_cache
def item(dim, name, **options):
    return items(dim, **options)[name]()


def floats(call):
    """The outputs as one vector: those, and the gradients, that a transformation must not change."""

    def flat(variables, x):
        leaves = [y for y in jax.tree.leaves(call(variables, x)) if jnp.issubdtype(y.dtype, jnp.floating)]
        return jnp.concatenate([y.astype(jnp.float32).reshape(-1) for y in leaves])

    return flat


@functools.lru_cache
def reference(dim, name):
    """Outputs, and the gradients of a random sum of them."""
    return jit(values(item(dim, name).call))(*item(dim, name)[1:])


def values(call):
    def run(variables, x):
        y, pullback = jax.vjp(floats(call), variables, x)
        return y, pullback(jnp.asarray(np.random.default_rng(9).normal(size=y.shape), y.dtype))

    return run


def assert_close(found, expected, tolerance=1e-5):
    chex.assert_trees_all_equal_shapes(found, expected)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * max(1, np.abs(e).max(initial=0)))


@EVERY
def test_differentiable_forwards_and_backwards_to_second_order(dim, name):
    """Along one direction: jvp and vjp agree, so do all four ways to a second derivative, and differences of the values."""
    (call, variables, x), step = item(dim, name), 3e-3
    flat, start = floats(call), (variables, x)
    direction = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(a.size).normal(size=a.shape), a.dtype), start)

    @jit
    def run(start, direction):
        wave = jnp.cos(jnp.arange(flat(*start).size, dtype=jnp.float32))
        f = lambda start: (wave * jnp.sin(flat(*start))).sum()
        forward = lambda f: lambda start: jax.jvp(f, (start,), (direction,))[1]
        backward = lambda f: lambda start: sum(jax.tree.leaves(jax.tree.map(
            lambda g, d: (g * d).sum(), jax.grad(f)(start), direction)))
        at = lambda t: f(jax.tree.map(lambda s, d: s + t * d, start, direction))
        first = jnp.stack([way(f)(start) for way in (forward, backward)])
        second = jnp.stack([a(b(f))(start) for a in (forward, backward) for b in (forward, backward)])
        slopes = [forward(f)(jax.tree.map(lambda s, d, t=t: s + t * d, start, direction)) for t in (-step, step)]
        return first, second, (at(step) - at(-step)) / (2 * step), (slopes[1] - slopes[0]) / (2 * step)

    first, second, difference, second_difference = run(start, direction)
    np.testing.assert_allclose(first, first[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(second, second[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(first[0], difference, rtol=3e-2, atol=3e-2)
    np.testing.assert_allclose(second[0], second_difference, rtol=5e-2, atol=5e-2)
