"""Equivariance measures: 0 for what is equivariant, large for what is not, small where only the interpolation errs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pdo_jax as pdo
from pdo_jax import fields, groups
from pdo_jax.equivariance import assert_equivariant, error

LINE, P4, P8, P4M, CUBE = (groups.reflection(1), groups.cyclic(4), groups.cyclic(8), groups.dihedral(4), groups.octahedral())
SPACES = {1: (9,), 2: (8, 8), 3: (5, 5, 5)}
GROUPS = pytest.mark.parametrize("group", [LINE, P4, P4M, CUBE], ids=lambda g: g.name)


def image(group, channels=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, *SPACES[group.dim], channels)), jnp.float32)


def smooth(size, width=0.3):
    """Two waves in a Gaussian envelope that is small at the border, on size × size points of [-1, 1]²."""
    axis = (np.arange(size) - (size - 1) / 2) / (size / 2)
    u, v = np.meshgrid(axis, axis, indexing="ij")
    waves = np.stack([np.sin(3 * u + 1) + u * v, np.cos(2 * v - u)], -1)
    return jnp.asarray((waves * np.exp(-(u**2 + v**2) / (2 * width**2))[..., None])[None], jnp.float32)


def difference(x, axis=1):
    """A one-sided difference along an axis, circular: breaks every element but the identity that moves this axis."""
    return x - jnp.roll(x, 1, axis)


def lifted(group):
    """An exactly equivariant function to regular fields: [Ψf](·, A) = π_A q π_A^{-1} f for any q, here one without symmetry."""
    def turned(x, a):
        x = groups.transform(x, a.T)
        return groups.transform(difference(x) * x, a)

    return jax.jit(lambda x: jnp.stack([turned(x, a) for a in group.elements], -1))


@GROUPS
def test_equivariant_functions_have_no_error(group):
    """Images (pointwise), fields (a turned operator) and invariants (a sum): 0 for every element, as float64 [order]."""
    x = image(group)
    for fn in (lambda x: x**2, lifted(group), lambda x: (x**2).sum(range(1, 1 + group.dim))):
        errors = error(fn, x, group)
        assert errors.shape == (group.order,) and errors.dtype == np.float64
        np.testing.assert_allclose(errors, 0, atol=1e-6)
        assert errors[0] == 0
        assert_equivariant(fn, x, group)


def test_products_are_taken_in_full_precision():
    """Also on a GPU or TPU, whose default would drown the error of an equivariant function; the user's setting comes back."""
    seen, before = [], jax.config.jax_default_matmul_precision
    error(lambda x: seen.append(jax.config.jax_default_matmul_precision) or x, image(P4), P4)
    assert seen == ["highest"] * 5 and jax.config.jax_default_matmul_precision == before


@GROUPS
def test_other_functions_have_large_errors(group):
    """Images, fields and invariants of the same shapes that are not equivariant: 0 for the identity alone."""
    x = image(group)

    def unturned(x):  # every orientation the same operator
        return jnp.stack([difference(x)] * group.order, -1)

    for fn in (difference, unturned, lambda x: x[:, 0].reshape(len(x), -1)):
        errors = error(fn, x, group)
        assert errors[0] == 0 and errors[1:].max() > 0.1
        with pytest.raises(AssertionError, match="not equivariant"):
            assert_equivariant(fn, x, group)


def test_the_error_is_the_relative_norm():
    """|fn(g·x) - g·y| / |y|, by hand for a quarter turn of one image."""
    x = image(P4)
    y, turned = np.asarray(difference(x)), np.asarray(difference(jnp.rot90(x, axes=(1, 2))))
    expected = np.linalg.norm(turned - np.rot90(y, axes=(1, 2))) / np.linalg.norm(y)
    assert error(difference, x, P4)[1] == pytest.approx(expected, rel=1e-5)
    assert error(lambda x: 1e-3 * difference(x), x, P4)[1] == pytest.approx(expected, rel=1e-5)


def test_elements_that_break_it_are_named():
    """A difference along the first axis survives the reflection of the second alone: the others are listed."""
    errors = error(difference, image(P4M), P4M)
    bad = [i for i in range(8) if errors[i] > 1e-5]
    assert 0 not in bad and P4M.index(np.diag([1.0, -1.0])) not in bad and len(bad) == 6
    with pytest.raises(AssertionError) as caught:
        assert_equivariant(difference, image(P4M), P4M, atol=1e-4)
    message = str(caught.value)
    assert "p4m" in message and "0.0001" in message
    listed = [int(part.split(":")[0]) for part in message.split("by element ")[1].split(", ")]
    assert listed == bad
    assert_equivariant(difference, image(P4M), P4M, atol=10)


def test_not_a_number_is_an_error():
    """A function that gives NaN passes for no tolerance."""
    with pytest.raises(AssertionError, match="nan"):
        assert_equivariant(lambda x: x * jnp.nan, image(P4), P4)


def test_outputs_of_another_resolution():
    """Strided, odd and rectangular outputs turn about their own centre."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 8, 1)), jnp.float32)
    np.testing.assert_allclose(error(lambda x: x.reshape(1, x.shape[1] // 2, 2, x.shape[2] // 2, 2, 1).sum((2, 4)), x, P4), 0,
                               atol=1e-6)


def test_elements_off_the_grid_are_interpolated():
    """For eighths of a turn of a smooth image the interpolation's own error is small, falls as the grid is refined, and has
    no share outside the disc; a quarter turn stays exact."""
    worst = []
    for size in (24, 48):
        errors = error(lambda x: x**2, smooth(size), P8)
        assert errors[2] == errors[4] == errors[6] == 0
        worst.append(errors.max())
    assert 0 < worst[0] < 2e-2 and worst[1] < worst[0] / 4
    rim = smooth(24).at[:, :3].add(3.0)  # an edge outside the disc, which interpolates badly
    assert error(lambda x: x**2, rim, P8, radius=0.5)[1] < 2e-2 < 0.1 < error(lambda x: x**2, rim, P8, radius=1.0)[1]


def test_fields_and_invariants_off_the_grid():
    """A known-equivariant lifting and an invariant integral have small errors under eighths of a turn; wrong ones large."""
    x = smooth(48)
    centre = (np.arange(48) - 23.5) / 24

    def lift(x):  # the derivative along each of eight directions
        du, dv = (jnp.roll(x, -1, axis) - jnp.roll(x, 1, axis) for axis in (1, 2))
        t = 2 * np.pi * np.arange(8) / 8
        return du[..., None] * np.cos(t).astype(np.float32) + dv[..., None] * np.sin(t).astype(np.float32)

    assert error(lift, x, P8).max() < 2e-2
    assert error(lambda x: lift(x)[..., ::-1], x, P8)[1] > 0.5
    assert error(lambda x: (x**2).mean((1, 2)), x, P8).max() < 2e-2
    assert error(lambda x: (x**2 * jnp.asarray(centre[:, None, None] > 0)).mean((1, 2)), x, P8)[1] > 0.05


def test_assert_equivariant_off_the_grid():
    """Without a radius only grid-preserving elements are tested; with one all are, to the tolerance that is given."""
    x = smooth(24)
    assert_equivariant(lambda x: x**2, x, P8)
    assert_equivariant(lambda x: x**2, x, P8, atol=2e-2, radius=0.7)
    with pytest.raises(AssertionError, match="1: .*3: .*5: .*7: "):
        assert_equivariant(lambda x: x**2, x, P8, radius=0.7)


def test_jitted_functions_and_bfloat16():
    """fn may be jitted, and return a lower precision or numpy arrays; errors are computed in float32 and float64."""
    x = image(P4)
    assert error(jax.jit(lambda x: (x**2).astype(jnp.bfloat16)), x, P4).max() == 0
    assert error(lambda x: np.asarray(x) ** 2, x, P4).max() == 0
    assert error(lambda x: 0 * x, x, P4).max() == 0  # not 0 / 0


@pytest.mark.parametrize("fn, shape, group, message", [
    (lambda x: x, (2, 8, 8), P4, r"\[batch, \*space, channels\], got \(2, 8, 8\)"),
    (lambda x: x, (2, 8, 8, 1), CUBE, "space"),
    (lambda x: x[..., None], (2, 8, 8, 1), P4, r"channels, 4\], got \(2, 8, 8, 1, 1\)"),
    (lambda x: x.sum((1, 2, 3)), (2, 8, 8, 1), P4, r"fn must return .*got \(2,\)"),
    (lambda x: x.sum(1), (2, 8, 8, 1), P4, r"fn must return .*got \(2, 8, 1\)"),
])
def test_bad_shapes_are_named(fn, shape, group, message):
    """An input or an output that is no image, field or list of invariants raises ValueError with the shape."""
    for measure in (error, assert_equivariant):
        with pytest.raises(ValueError, match=message):
            measure(fn, jnp.ones(shape), group)


@pytest.mark.parametrize("radius", [0, -0.5, 1.1, float("nan")])
def test_bad_radii_are_named(radius):
    """A radius outside (0, 1] raises ValueError."""
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        functools.partial(error, radius=radius)(lambda x: x, image(P8), P8)


# Representations of inputs and outputs, and layers that go wrong.


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def gradient(x):
    """A vector field [batch, *space, channels, 2] by central differences on the torus."""
    return jnp.stack([(jnp.roll(x, -1, axis) - jnp.roll(x, 1, axis)) / 2 for axis in (1, 2)], -1)


def test_fields_of_any_representation_go_in_and_out():
    """A gradient and a divergence are exact under the mirrors that a scalar or regular reading would condemn."""
    scalar, vector = fields.trivial(P4M), fields.standard(P4M)
    x = normal(2, 8, 8, 3)
    assert error(gradient, x, P4M, out_rep=vector).max() < 1e-6
    divergence = lambda v: sum(gradient(v[..., k])[..., k] for k in (0, 1))
    assert error(divergence, gradient(x), P4M, in_rep=vector).max() < 1e-6
    assert error(lambda v: divergence(v)[..., None], gradient(x), P4M, in_rep=vector, out_rep=scalar).max() < 1e-6
    assert error(lambda x: gradient(x)[..., 0, :], x, P4, out_rep=None).max() > 0.5, "an image of two channels is not a vector"


def test_outputs_without_space():
    """[batch, 2] and [batch, channels, 2]: vectors where out_rep says so, else invariants."""
    flux = lambda x: jnp.stack([(jnp.take(x, -1, axis) - jnp.take(x, 0, axis)).sum((1, 2)) for axis in (1, 2)], -1)
    x = normal(2, 8, 8, 3)
    assert error(flux, x, P4).max() > 1
    for fn in (flux, lambda x: jnp.stack([flux(x), -flux(x)], 1)):
        assert error(fn, x, P4, out_rep=fields.standard(P4)).max() < 1e-6


def test_several_outputs():
    """A pytree: the largest error counts, each output by its own representation."""
    x, vector = normal(2, 8, 8, 1), fields.standard(P4)
    both = lambda x: {"scalar": x**2, "vector": gradient(x)}
    assert error(both, x, P4, out_rep=(None, vector)).max() < 1e-6
    assert error(lambda x: (x, x[:, ::-1]), x, P4).max() > 0.5
    with pytest.raises(ValueError, match="one for each of 2 arrays, got 3"):
        error(both, x, P4, out_rep=(None, vector, None))


def test_a_larger_representation_is_restricted():
    """A field of p8 is turned by the elements of p4 in it; one of another group is an error."""
    layer = pdo.LiftingConv(2, P8, kernel_size=3)
    x = normal(1, 9, 9, 1)
    variables = layer.init(jax.random.key(0), x)
    assert error(lambda x: layer.apply(variables, x), x, P4, out_rep=P8).max() < 1e-5
    with pytest.raises(ValueError, match="no subgroup"):
        error(lambda x: layer.apply(variables, x), x, P4M, out_rep=P8)


class Chain(nn.Module):
    """Lifting to one group, a group convolution of another, which has as many elements."""

    first: groups.Group
    second: groups.Group

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(pdo.GroupBatchNorm(self.first)(pdo.LiftingConv(2, self.first, kernel_size=3)(x), train))
        return pdo.GroupConv(2, self.second, kernel_size=3, name="wrong")(x)


SHUFFLED = groups.from_generators([groups.cyclic(8).elements[3]], name="p8 in another order")


@pytest.mark.parametrize("first, second, fault", [
    (P8, P8, None), (P8, P4M, 'input of GroupConv "wrong"'), (P8, SHUFFLED, 'input of GroupConv "wrong"')], ids=str)
def test_check_layers_names_the_first_that_takes_a_field_for_another(first, second, fault):
    """p8 into p4m, or into p8 with its elements in another order, passes every check of shapes; turning the input shows it."""
    network, x = Chain(first, second), normal(1, 9, 9, 1)
    variables = network.init(jax.random.key(0), x)
    if fault is None:
        return pdo.equivariance.check_layers(network, variables, x, train=False)
    with pytest.raises(AssertionError, match=fault):
        pdo.equivariance.check_layers(network, variables, x)
    with pytest.raises(AssertionError, match=f"not equivariant.*{fault}"):
        assert_equivariant(jax.jit(lambda x: network.apply(variables, x)), x, groups.cyclic(4), out_rep=second)
    with pytest.raises(ValueError, match="Dense calls no layer"):
        pdo.equivariance.check_layers(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), x), x)
