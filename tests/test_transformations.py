"""Every layer and function of fields, under every transformation and mode of JAX."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from table import ALL, CORE, has_statistics, items

import pdo_jax as pdo

EVERY = pytest.mark.parametrize("dim, name", ALL, ids=str)
COMPILED = pytest.mark.parametrize("dim, name", CORE, ids=str)


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


@COMPILED
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


@EVERY
def test_traced_under_the_strictest_modes(dim, name):
    """No promotion of ranks or dtypes, no leaked tracers: the program and its gradients are traced all the same."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.checking_leaks():
        call, variables, x = items(dim)[name]()
        _, (dvariables, dx) = jax.eval_shape(lambda v, x: values(call)(v, x), variables, x)
    chex.assert_trees_all_equal_shapes_and_dtypes((dvariables, dx), (variables, x))


@COMPILED
def test_x64_changes_nothing_in_float32(dim, name):
    """With x64 and with NaN as an error: the same outputs and gradients, of the same types."""
    with jax.enable_x64(True), jax.debug_nans(True):
        found = jit(values(items(dim)[name]().call))(*item(dim, name)[1:])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, reference(dim, name))
    assert_close(found, reference(dim, name), 1e-4)


@EVERY
def test_float64(dim, name):
    """In x64 a float64 input gives float64 outputs; parameters and running averages stay float32."""
    with jax.enable_x64(True):
        call, variables, x = items(dim, dtype=jnp.float64)[name]()
        outputs = jax.tree.leaves(jax.eval_shape(call, variables, x))
        assert outputs[0].dtype == jnp.float64 or name in ("network", "UNet")
        assert {v.dtype for v in (*jax.tree.leaves(variables), *outputs[1:])} <= {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", [name for name in items(2) if name.split()[-1] not in ("dense", "matmul", "fourier", "UNet")])
def test_without_jit(name):
    """``jax.disable_jit`` runs the same operations one by one; those of gradients too, in a network."""
    (call, variables, x), ways = item(2, name), values if name == "network" else floats
    with jax.disable_jit():
        found = ways(call)(variables, x)
    assert_close(found, reference(2, name) if name == "network" else reference(2, name)[0], 1e-4)


@COMPILED
def test_an_empty_batch(dim, name):
    """A batch of none: empty results, and gradients that are 0, not an error, nor NaN from statistics of nothing."""
    call, variables, x = item(dim, name)
    if not has_statistics(name):
        assert jax.eval_shape(values(call), variables, x[:0])[1][1].shape == (0, *x.shape[1:])
        return
    _, (dvariables, dx) = jit(values(call))(variables, x[:0])
    assert dx.shape == (0, *x.shape[1:])
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), dvariables)


def transformed(call):
    """The outputs of a checkpoint of a vmap of the call, in a scan."""
    each = jax.checkpoint(jax.vmap(floats(call), (None, 0)))
    return lambda v, x: jax.lax.scan(lambda c, x: (c, each(v, x)), 0, x[None, None])[1][0, 0]


@COMPILED
def test_vmap_remat_and_scan(dim, name):
    """A call inside all three gives what the call gives, gradients too."""
    call, variables, x = item(dim, name)
    assert_close(jit(values(transformed(call)))(variables, x), reference(dim, name))


@pytest.mark.parametrize("dim, name", [each for each in ALL if each not in CORE], ids=str)
def test_the_others_in_one_program(dim, name):
    """What is computed in other dimensions as in the plane: under x64, with NaN as an error, inside vmap, remat and scan, the
    outputs and gradients are, in their types too, those of the call."""
    call, variables, x = item(dim, name)
    with jax.enable_x64(True), jax.debug_nans(True):
        found, expected = jit(lambda v, x: (values(transformed(call))(v, x), values(call)(v, x)))(variables, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(found[1], (variables, x))
    assert_close(found, expected)


@COMPILED
def test_portable_programs(dim, name):
    """Inside ``portable()`` an exported program gives the same numbers, and holds neither a choice of platform nor a layout."""
    call, variables, x = item(dim, name)
    with pdo.lowering.portable():
        exported = jax.export.export(jax.jit(lambda v, x: floats(call)(v, x)))(variables, x)
        program = str(jax.make_jaxpr(lambda v, x: floats(call)(v, x))(variables, x))
    assert not any(word in program for word in ("platform_index", "layout_constraint", "pdo_bilinear"))
    assert_close(jit(exported.call)(variables, x), reference(dim, name)[0])
