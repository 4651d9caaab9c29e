"""Options of the convolutions, each against a law: padding, dilation, parts, sizes and spacing of each axis, the adjoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit
from test_layers import normal

import pdo_jax as pdo
from pdo_jax import equivariance, fields, groups

QUARTER = groups.from_generators([[[0, -1, 0], [1, 0, 0], [0, 0, 1]], -np.eye(3)], name="C4h")
GROUPS = {1: groups.reflection(1), 2: groups.dihedral(4), 3: QUARTER}
SPACE = {1: (7,), 2: (6, 7), 3: (5, 5, 4)}


def made(layer, x):
    variables = jit(layer.init)(jax.random.key(0), x)
    return jit(lambda x: layer.apply(variables, x)), variables


def grid_elements(group, spacing):
    """Signed permutations that swap axes of one spacing alone."""
    kept = [np.allclose(np.abs(a) @ spacing, spacing) for a in group.elements]
    return groups.from_elements(group.elements[group.preserves_grid & kept])


OPTIONS = {
    "reflect": dict(padding="REFLECT"), "edge, dilated": dict(padding="EDGE", kernel_dilation=2),
    "depthwise": dict(feature_group_count=2, features=4), "transposed": dict(strides=2, transpose=True),
    "transposed, periodic": dict(strides=3, transpose=True, padding="CIRCULAR", feature_group_count=2),
}


@pytest.mark.parametrize("dim", GROUPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_equivariant(dim, name):
    """Under every element that keeps the grid: regular fields, and operators from vectors to scalars and vectors."""
    group, options = GROUPS[dim], {"features": 2, "kernel_size": 3} | OPTIONS[name]
    vector = fields.standard(group)
    mixed = fields.direct_sum([fields.trivial(group), vector])
    for layer, rep, out in ((pdo.GroupConv(group=group, **options), group, group),
                            (pdo.PDOConv(in_rep=vector, out_rep=mixed, **options), vector, mixed)):
        x = normal(1, *SPACE[dim], 2, group.order if rep is group else dim)
        equivariance.assert_equivariant(made(layer, x)[0], x, group, in_rep=rep, out_rep=out, atol=2e-5)


@pytest.mark.parametrize("dim", [2, 3])
def test_sizes_and_spacing_of_each_axis_keep_what_does_not_swap_them(dim):
    """With a kernel of 5, 5, 3 points and slices of 2.5, the elements that mirror axes or swap the first two are exact."""
    group, sizes, spacing = {2: GROUPS[2], 3: groups.octahedral()}[dim], (5, 5, 3)[-dim:], (1, 1, 2.5)[-dim:]
    kept = grid_elements(group, np.array(spacing))
    assert kept.order == {2: 4, 3: 8}[dim] and set(sizes) == {3, 5}
    x = normal(1, *SPACE[dim], 1)
    for options in (dict(kernel_size=sizes), dict(spacing=spacing, kernel_size=3), dict(spacing=spacing, kernel_size=sizes)):
        layer = made(pdo.LiftingConv(2, group, basis=2, **options), x)[0]
        errors = equivariance.error(layer, x, group)
        exact = [kept._index(a) is not None for a in group.elements]
        assert (errors[exact] < 1e-5).all() and (errors[group.preserves_grid & ~np.array(exact)] > 1e-3).all()


@pytest.mark.parametrize("scheme", [pdo.stencils.central_difference, pdo.stencils.rbf_fd])
def test_with_spacing_derivatives_are_those_of_space(scheme):
    """On polynomials, which stencils take exactly, every rotation of the cube acts right on voxels of 1 × 1 × 2.5: the response
    at the centre to a turned f is the turned response, though the turned grid is another one."""
    group, spacing = groups.octahedral(), np.array([1, 1, 2.5])
    points = (np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), -1)) * spacing
    random = np.random.default_rng(0)
    constant, linear, square = random.normal(), random.normal(size=3), random.normal(size=(3, 3))

    def f(x):
        return constant + x @ linear + np.einsum("...i,ij,...j->...", x, square, x)

    layer = pdo.LiftingConv(3, group, kernel_size=5, basis=2, scheme=scheme, spacing=tuple(spacing), padding="VALID")
    images = np.stack([f(points @ a) for a in group.elements]).astype(np.float32)  # f(A^{-1} x)
    y = np.asarray(made(layer, images[..., None])[0](images[..., None]))[:, 0, 0, 0]
    for a in range(group.order):
        np.testing.assert_allclose(y[a], y[0][:, group.table[group.inverse[a]]], atol=2e-4 * np.abs(y).max())
    assert np.abs(y[1] - y[0]).max() > 0.01 * np.abs(y).max()


@pytest.mark.parametrize("way", ["matmul", "fourier"])
def test_lowerings_agree_under_all_options(way):
    """Outputs and gradients are those of "dense"."""
    group, x = groups.dihedral(4), normal(2, 9, 11, 4, 8)
    loss = lambda layer, v, x: jnp.sin(layer.apply(v, x)).sum()
    options = dict(kernel_size=(5, 3), strides=(2, 1), kernel_dilation=(1, 2), padding="REFLECT", spacing=(1, 1.5), basis=2,
                   feature_group_count=2)
    for transpose in (False, True):
        layer = pdo.GroupConv(2, group, lowering="dense", transpose=transpose, **options)
        variables = jit(layer.init)(jax.random.key(0), x)
        results = [jit(jax.value_and_grad(functools.partial(loss, layer.clone(lowering=w)), (0, 1)))(variables, x)
                   for w in ("dense", way)]
        for found, expected in zip(*map(jax.tree.leaves, results[::-1]), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("padding, mode", [
    ("REFLECT", "reflect"), ("EDGE", "edge"), ("CIRCULAR", "wrap"), ("SAME", "constant")])
def test_padding_is_that_of_numpy(padding, mode):
    """As a "VALID" convolution of the padded array, also dilated."""
    x, group = np.asarray(normal(1, 6, 7, 2, 4)), groups.cyclic(4)
    for dilation in (1, 2):
        layer = pdo.GroupConv(2, group, kernel_size=3, kernel_dilation=dilation, padding=padding)
        y, variables = jit(layer.init_with_output)(jax.random.key(0), x)
        wide = np.pad(x, ((0, 0), (dilation,) * 2, (dilation,) * 2, (0, 0), (0, 0)), mode)
        assert y.shape == x.shape
        np.testing.assert_allclose(jit(layer.clone(padding="VALID").apply)(variables, wide), y, atol=1e-5)
    if mode in ("reflect", "wrap"):
        with pytest.raises(ValueError, match=rf"{padding} padding by .* needs a larger input, got \(1, 7\)"):
            pdo.GroupConv(2, group, padding=padding).init(jax.random.key(0), x[:, :1])
    with pytest.raises(ValueError, match='"SAME", "VALID", \'CIRCULAR\', \'REFLECT\', \'EDGE\' or numbers, got \'ZEROS\''):
        pdo.GroupConv(2, group, padding="ZEROS").init(jax.random.key(0), x)


def test_dilation_is_the_kernel_on_a_coarser_grid():
    """Every second output of a kernel of dilation 2 is that of the kernel on every second point."""
    x = normal(1, 11, 13, 2, 4)
    layer = pdo.GroupConv(3, groups.cyclic(4), kernel_size=3, padding="VALID")
    y, variables = layer.init_with_output(jax.random.key(0), x[:, ::2, ::2])
    np.testing.assert_allclose(layer.clone(kernel_dilation=2).apply(variables, x)[:, ::2, ::2], y, atol=1e-5)


def test_parts_are_convolutions_of_their_own():
    """Channels and features in two parts: the two halves, each by half of the kernel; sizes that do not divide are named."""
    x, group = normal(1, 6, 6, 4, 4), groups.cyclic(4)
    for layer in (pdo.GroupConv(6, group, feature_group_count=2),
                  pdo.PDOConv(6, fields.regular(group), fields.standard(group), feature_group_count=2)):
        y, variables = jit(layer.init_with_output)(jax.random.key(0), x)
        w = variables["params"]["kernel"]
        assert w.shape[-1] == 6 and 2 in w.shape
        for k in range(2):
            half = jit(layer.clone(features=3, feature_group_count=1).apply)(
                {"params": {"kernel": jnp.split(w, 2, axis=w.ndim - 1)[k]}}, x[..., 2 * k:2 * k + 2, :])
            np.testing.assert_allclose(y[..., 3 * k:3 * k + 3, :], half, atol=1e-5)
        with pytest.raises(ValueError, match="feature_group_count=3 .* must divide its 4 channels and 6 features"):
            layer.clone(feature_group_count=3).init(jax.random.key(0), x)


@pytest.mark.parametrize("options", [
    dict(strides=2), dict(strides=(2, 3), padding="CIRCULAR"), dict(strides=2, padding="REFLECT", kernel_dilation=2),
    dict(strides=2, padding="VALID", feature_group_count=2), dict(strides=1, padding=(2, (0, 1)))], ids=str)
def test_transposed_convolutions_are_adjoints(options):
    """⟨conv(x), y⟩ = ⟨x, transposed(y)⟩ with one kernel, and the output has strides · (n - 1) + 1 points with zeros."""
    group = groups.dihedral(4)
    vector, regular = fields.standard(group), fields.regular(group)
    y = normal(1, 4, 5, 2, 8)
    for conv, transposed in (
            (pdo.GroupConv(2, group, **options), pdo.GroupConv(4, group, transpose=True, **options)),
            (pdo.PDOConv(2, vector, regular, **options), pdo.PDOConv(4, regular, vector, transpose=True, **options))):
        found, variables = jit(transposed.init_with_output)(jax.random.key(0), y)
        x = normal(*found.shape, seed=1)
        forward = jit(conv.apply)(variables, x)
        assert forward.shape == y.shape
        np.testing.assert_allclose((forward * y).sum(), (x * found).sum(), rtol=1e-4, atol=1e-2)
        if "padding" not in options:
            assert found.shape[1:3] == (7, 9)
    skewed = fields.Representation("skewed", group, [[[1, 1], [0, 1]] @ a @ [[1, -1], [0, 1]] for a in group.elements])
    with pytest.raises(ValueError, match="only for orthogonal representations, got out_rep=.*skewed"):
        pdo.PDOConv(2, regular, skewed, transpose=True).init(jax.random.key(0), y)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("kind", ["group", "steerable"])
def test_variance_at_initialisation(kind, transpose):
    """White noise of variance 1 leaves with variance near 1, also in parts and transposed (where a ReLU comes before: 2)."""
    group, options = groups.cyclic(4), dict(strides=2 if transpose else 1, feature_group_count=2, transpose=transpose)
    layer = pdo.GroupConv(8, group, **options) if kind == "group" else pdo.PDOConv(
        8, fields.regular(group), fields.regular(group), **options)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 8, 4)), jnp.float32)
    y = made(layer, x)[0](x)
    edge = 2 * (1 + transpose)
    assert 0.6 < y[:, edge:-edge, edge:-edge].var() < 2.6


def test_a_folded_network_keeps_what_is_not_folded():
    """``to_plain`` folds convolutions with sizes, dilation and spacing of their own; those in parts or transposed stay."""
    group = groups.cyclic(4)
    network = nn.Sequential([
        pdo.LiftingConv(4, group, kernel_size=(5, 3), spacing=(1, 2), padding="EDGE", basis=2),
        pdo.GroupConv(4, group, kernel_size=3, kernel_dilation=2), pdo.GroupConv(4, group, feature_group_count=2),
        pdo.GroupConv(4, group, strides=2, transpose=True)])
    x = normal(2, 6, 7, 1)
    y, variables = jit(network.init_with_output)(jax.random.key(0), x)
    plain, folded = pdo.export.to_plain(network, variables, x.shape)
    assert [folded["params"][f"layers_{k}"]["kernel"].ndim for k in range(4)] == [4] * 4
    assert folded["params"]["layers_0"]["kernel"].shape == (5, 3, 1, 16)
    with pdo.lowering.portable():  # converters read no convolution of parts
        assert "feature_group_count=2" not in str(jax.make_jaxpr(lambda x: network.apply(variables, x))(x))
    for way in ("dense", "auto"):
        np.testing.assert_allclose(jit(plain.clone(lowering=way).apply)(folded, x), y, atol=1e-4)
