"""Convolutions: every module commutes with the group, before and after training, exactly on the grid and to O(h²) off it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from quick import jit

import pdo_jax as pdo
from pdo_jax import fields, groups, operators, stencils

LINE, P4, P6, P8, P4M, P6M = (groups.reflection(1), groups.cyclic(4), groups.cyclic(6), groups.cyclic(8), groups.dihedral(4),
                              groups.dihedral(6))
TETRA, CUBE, O_H, ICOSA = groups.tetrahedral(), groups.octahedral(), groups.octahedral(True), groups.icosahedral()


def shape(batch, space, channels, law):
    """Of a field that transforms by a law: a Representation, or None for an image."""
    return (batch, *space, channels) if law is None else (batch, *space, channels, law.dim)


def turn(x, group, a, law):
    """[A·F](x) = ρ(A) F(A^{-1}x), for an A that maps the grid to itself; in numpy, apart from the library's own."""
    matrix = np.rint(group.elements[a]).astype(int)
    source = np.abs(matrix).argmax(1)
    x = np.transpose(x, [0, *(1 + source), *range(1 + group.dim, np.ndim(x))])
    x = np.flip(x, [1 + i for i in range(group.dim) if matrix[i, source[i]] < 0])
    return x if law is None else x @ law.matrices[a].T.astype(np.float32)


def all_turns(x, group, law):
    """x under every element that preserves the grid, one after another along the batch."""
    return np.concatenate([turn(np.asarray(x), group, a, law) for a in np.flatnonzero(group.preserves_grid)])


def check(apply, x, group, in_law, out_law, tolerance=1e-5):
    """apply(A·x) = A·apply(x) for all grid-preserving A, relative to the largest value; the identity comes first."""
    y = np.asarray(apply(all_turns(x, group, in_law)))
    np.testing.assert_allclose(y, all_turns(y[:len(x)], group, out_law), atol=tolerance * np.abs(y).max())


def lifting(group, **options):
    return pdo.LiftingConv(2, group, use_bias=True, **options), None, fields.regular(group)


def convolution(group, **options):
    return pdo.GroupConv(2, group, use_bias=True, **options), fields.regular(group), fields.regular(group)


def steerable(in_rep, out_rep, **options):
    return pdo.PDOConv(2, in_rep, out_rep, **options), in_rep, out_rep


QUARTERS = fields.quotient(P4M, [0, 4])
MODULES = {  # module, law of the input, law of the output, space
    "lifting, line": (lifting(LINE), (7,)),
    "lifting, p4, strided": (lifting(P4, strides=2), (9, 9)),
    "lifting, p8": (lifting(P8), (6, 6)),
    "lifting, p8, framed": (lifting(P8, frame=math.pi / 8, padding=1), (7, 7)),
    "lifting, p4m, 7 points": (lifting(P4M, kernel_size=7, basis=3, padding="CIRCULAR"), (8, 8)),
    "lifting, p6m": (lifting(P6M, kernel_size=3, padding="VALID", strides=3), (6, 6)),
    "lifting, p8, gaussian": (lifting(P8, basis=2, scheme=stencils.gaussian_derivative), (6, 6)),
    "lifting, p8, rbf": (lifting(P8, basis=2, scheme=stencils.rbf_fd, strides=2), (7, 7)),
    "lifting, O_h": (lifting(O_H, kernel_size=3), (4, 4, 4)),
    "lifting, T, strided": (lifting(TETRA, strides=2), (5, 5, 5)),
    "lifting, I": (lifting(ICOSA, kernel_size=3, basis=2), (4, 4, 4)),
    "lifting, O, pointwise": (lifting(CUBE, kernel_size=1), (3, 3, 3)),
    "group, line, strided": (convolution(LINE, strides=2), (9,)),
    "group, line, circular": (convolution(LINE, padding="CIRCULAR", kernel_size=7), (8,)),
    "group, p4": (convolution(P4), (6, 6)),
    "group, p4m, 3 points, strided": (convolution(P4M, kernel_size=3, strides=2, padding="VALID"), (7, 7)),
    "group, p8, padding 1": (convolution(P8, frame=math.pi / 8, padding=1), (6, 6)),
    "group, p8, strided": (convolution(P8, strides=2), (7, 7)),
    "group, p8, 7 points": (convolution(P8, kernel_size=7, basis=2, padding=[3, (3, 3)]), (7, 7)),
    "group, p6, valid": (convolution(P6, padding="VALID"), (7, 7)),
    "group, p6m, pointwise": (convolution(P6M, kernel_size=1, strides=2), (5, 5)),
    "group, p6m, circular": (convolution(P6M, kernel_size=3, padding="circular"), (4, 4)),
    "group, O_h": (convolution(O_H, kernel_size=3, basis=1), (3, 3, 3)),
    "group, T, strided": (convolution(TETRA, kernel_size=3, strides=2), (5, 5, 5)),
    "group, I": (convolution(ICOSA, kernel_size=3, basis=1), (3, 3, 3)),
    "group, p4m, rank 3": (convolution(P4M, kernel_size=3, rank=3), (6, 6)),
    "image to vectors": (steerable(fields.trivial(P8), fields.standard(P8)), (6, 6)),
    "vectors to vectors": (steerable(fields.standard(P4M), fields.standard(P4M), padding="VALID"), (6, 6)),
    "vectors to features": (steerable(fields.standard(CUBE), fields.regular(CUBE), kernel_size=3), (4, 4, 4)),
    "features to quotient": (steerable(fields.regular(P4M), QUARTERS, use_bias=True, strides=2), (7, 7)),
    "pseudoscalars to features": (steerable(fields.determinant(LINE), fields.regular(LINE), order=3), (8,)),
    "irreps to irreps": (steerable(fields.direct_sum(fields.irreps(P6)), fields.direct_sum(fields.irreps(P6)[1:3])), (6, 6)),
    "pointwise": (steerable(fields.regular(TETRA), fields.standard(TETRA), kernel_size=1, order=0), (3, 3, 3)),
    "vectors, I": (steerable(fields.standard(ICOSA), fields.standard(ICOSA), kernel_size=3, scheme=stencils.rbf_fd), (4, 4, 4)),
}


@pytest.mark.parametrize("case, space", MODULES.values(), ids=MODULES)
def test_every_module_commutes_with_the_group(case, space):
    """layer(A·x) = A·layer(x) to 1e-5 for every A that preserves the grid, before and after three steps of training."""
    module, in_law, out_law = case
    group = out_law.group
    random = np.random.default_rng(0)
    x = random.normal(size=shape(1, space, 2, in_law)).astype(np.float32)
    xs = all_turns(x, group, in_law)
    params = jax.tree.map(lambda p: jnp.asarray(random.normal(0, 0.3, p.shape), p.dtype),  # biases start at 0 otherwise
                          jax.eval_shape(module.init, jax.random.key(0), xs)["params"])
    target = random.normal(size=jax.eval_shape(module.apply, {"params": params}, xs).shape).astype(np.float32)

    @jit
    def step(params):  # towards a target without symmetry
        def loss(params):
            y = module.apply({"params": params}, xs)
            return ((y - target) ** 2).mean(), y

        gradient, y = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), y

    for _ in range(4):
        before, (params, y) = params, step(params)
        y = np.asarray(y)
        np.testing.assert_allclose(y, all_turns(y[:1], group, out_law), atol=1e-5 * np.abs(y).max())
        assert any((b != p).all() for b, p in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True))


class Tiny(nn.Module):
    """Lifting, batch norm, ReLU, group convolution, down-sampling."""

    group: groups.Group
    kernel_size: int

    @nn.compact
    def __call__(self, x, train):
        basis = "paper" if self.group.dim < 3 else 1
        conv = functools.partial(pdo.GroupConv, 2, self.group, kernel_size=self.kernel_size, basis=basis)
        x = pdo.LiftingConv(2, self.group, kernel_size=self.kernel_size)(x)
        x = nn.relu(pdo.GroupBatchNorm(self.group)(x, train))
        x = nn.relu(pdo.GroupBatchNorm(self.group)(conv(strides=2)(x), train))
        return conv(padding="CIRCULAR")(x)


@pytest.mark.parametrize("group, kernel_size", [(LINE, 5), (P8, 5), (P4M, 3), (P6M, 3), (O_H, 3), (ICOSA, 3)],
                         ids=lambda v: getattr(v, "name", v))
def test_a_network_stays_equivariant_while_it_learns(group, kernel_size):
    """A stack of layers commutes with the group to 1e-5, freshly initialised and after three steps of Adam."""
    network, random, law = Tiny(group, kernel_size), np.random.default_rng(1), fields.regular(group)
    x = random.normal(size=(2, *(5, 5, 5)[:group.dim], 1)).astype(np.float32)
    variables = jit(network.init, static_argnums=2)(jax.random.key(0), x, True)
    target = random.normal(size=(2, *(3, 3, 3)[:group.dim], 2, group.order)).astype(np.float32)
    optimizer = optax.adam(1e-2)

    @jit
    def step(variables, state):
        def loss(params):
            y, new = network.apply({**variables, "params": params}, x, True, mutable="batch_stats")
            return ((y - target) ** 2).mean(), new

        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradient, state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state, value

    apply = jit(lambda variables, x: network.apply(variables, x, False))
    check(functools.partial(apply, variables), x, group, None, law)
    state, losses = optimizer.init(variables["params"]), []
    for _ in range(3):
        variables, state, value = step(variables, state)
        losses.append(value)
    assert losses[-1] < losses[0]
    check(functools.partial(apply, variables), x, group, None, law)


@pytest.mark.parametrize("strides, space", [(1, (5, 8)), (2, (5, 9))])
def test_rectangular_grids(strides, space):
    """A quarter turn of a rectangular field gives the rectangular result, turned: shapes and numbers."""
    module, law = pdo.GroupConv(2, P8, strides=strides), fields.regular(P8)
    x = np.random.default_rng(0).normal(size=(1, *space, 2, 8)).astype(np.float32)
    variables = jit(module.init)(jax.random.key(0), x)
    apply = jit(module.apply)
    y = np.asarray(apply(variables, x))
    for a in np.flatnonzero(P8.preserves_grid):
        np.testing.assert_allclose(apply(variables, turn(x, P8, a, law)), turn(y, P8, a, law), atol=1e-5 * np.abs(y).max())


# Second order: away from the grid the layer is equivariant up to O(h²).


def bump(x):
    """A smooth function of points [..., dim] without symmetry."""
    wave = np.sin(x @ np.linspace(0.9, 1.3, x.shape[-1])) + 0.5 * np.cos(1.1 * x[..., 0] - 0.4)
    return wave * np.exp(-0.15 * ((x - 0.2) ** 2).sum(-1))


def patches(points, matrix, h, size):
    """bump(A^{-1}x) on a grid of spacing h and ``size`` points along each axis around each of some points, as a batch."""
    offsets = np.stack(np.meshgrid(*[np.arange(size) - size // 2] * points.shape[-1], indexing="ij"), -1)
    around = points.reshape(len(points), *[1] * points.shape[-1], -1) + h * offsets
    return bump(around @ matrix)[..., None]  # (A^{-1}x)^T = x^T A


class Smooth(nn.Module):
    """Lifting and group convolution with a smooth nonlinearity between, operators of the function that the grid samples.

    On a grid of spacing h the stencil of ∂^α stands for h^|α| ∂^α: coefficients c of spacing 1 become c / h^|α|.
    """

    group: groups.Group
    h: float
    options: dict

    @nn.compact
    def __call__(self, x):
        options = dict(group=self.group, padding="VALID", lowering="dense", param_dtype=jnp.float64, kernel_init=self.scaled,
                       **self.options)
        return pdo.GroupConv(1, **options)(nn.tanh(pdo.LiftingConv(2, **options)(x)))

    def scaled(self, key, shape, dtype):
        bank, size = pdo.kernels.bank(self.group, **self.options), self.options["kernel_size"]
        base = operators.paper_basis(self.group.dim, size) if self.options["basis"] == "paper" else bank.indices
        base = [bank.indices.index(alpha) for alpha in base]
        scale = np.array([(0.5 / self.h) ** sum(bank.indices[i]) for i in base])
        c = jax.random.normal(key, (*shape[1:], len(base)), dtype) * 0.3 * scale
        return jnp.moveaxis(c @ np.linalg.inv(bank.turned[0][:, base]), -1, 0)  # c = w · turned[identity]


@pytest.mark.parametrize("group, element, options, h", [
    (P8, 1, dict(kernel_size=3, basis=2), 0.1), (P8, 3, dict(kernel_size=5, basis="paper"), 0.1),
    (P6, 1, dict(kernel_size=3, basis=1), 0.1), (groups.dihedral(8), 9, dict(kernel_size=3, basis="paper"), 0.1),
    (ICOSA, 1, dict(kernel_size=3, basis=2), 0.1), (P8, 1, dict(kernel_size=3, basis=2, scheme=stencils.rbf_fd), 0.1),
    (P8, 1, dict(kernel_size=5, basis=2, scheme=stencils.gaussian_derivative), 0.05),
], ids=["p8", "p8, nine operators", "p6", "p8m, reflected", "icosahedral", "rbf", "gaussian"])
def test_equivariance_error_is_of_second_order(group, element, options, h):
    """For an element off the grid the error of two layers falls as h² on a smooth input: measured order from 1.7 to 2.3.

    The input and the turned one are evaluated, not interpolated, around a few points x: y(A·f)(x, B) = y(f)(A^{-1}x, A^{-1}B).
    """
    assert not group.preserves_grid[element]
    points = np.random.default_rng(0).uniform(-1.5, 1.5, size=(12, group.dim))
    matrix, size, errors = group.elements[element], 2 * options["kernel_size"] - 1, []
    with jax.enable_x64(True):
        for spacing in (h, h / 2):
            network = Smooth(group, spacing, options)
            apply = jit(lambda x, network=network: network.init_with_output(jax.random.key(3), x)[0])
            turned = np.asarray(apply(patches(points, matrix, spacing, size)))
            expected = np.asarray(apply(patches(points @ matrix, np.eye(group.dim), spacing, size)))
            expected = expected[..., group.table[group.inverse[element]]]
            errors.append(np.linalg.norm(turned - expected) / np.linalg.norm(expected))
    assert turned.dtype == np.float64 and errors[0] > 1e-6
    assert 1.7 < math.log2(errors[0] / errors[1]) < 2.3, errors


# Dtypes, bias, what the layers span, bad input.


def test_bfloat16_compute_keeps_float32_parameters():
    """dtype is that of the result; parameters stay float32, and the numbers agree with float32 to bfloat16's precision."""
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3, 8)).astype(np.float32)
    plain, half = pdo.GroupConv(2, P8, use_bias=True), pdo.GroupConv(2, P8, use_bias=True, dtype=jnp.bfloat16)
    variables = jit(half.init)(jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    y, expected = jit(half.apply)(variables, x), jit(plain.apply)(variables, x)
    assert y.dtype == jnp.bfloat16 and expected.dtype == jnp.float32
    assert np.linalg.norm(y.astype(jnp.float32) - expected) < 2e-2 * np.linalg.norm(expected)
    gradient = jit(jax.grad(lambda v: half.apply(v, x).astype(jnp.float32).sum()))(variables)
    assert {p.dtype for p in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
    assert jax.eval_shape(plain.apply, variables, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    stored = pdo.PDOConv(2, fields.regular(P8), fields.standard(P8), param_dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(jax.eval_shape(stored.init, jax.random.key(0), x))} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_whole_numbers_are_computed_in_float32(dtype):
    """Images of pixels as bytes, or masks, give the same as their float32 copies."""
    x = np.random.default_rng(0).integers(0, 2, size=(1, 6, 6, 1)).astype(dtype)
    layer = pdo.LiftingConv(2, P4)
    variables = jit(layer.init)(jax.random.key(0), x)
    y = jit(layer.apply)(variables, x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, jit(layer.apply)(variables, x.astype(np.float32)))


@pytest.mark.parametrize("layer, x", [
    (pdo.LiftingConv(3, P4, use_bias=True), np.zeros((1, 5, 5, 2), np.float32)),
    (pdo.GroupConv(3, P4, use_bias=True), np.zeros((1, 5, 5, 2, 4), np.float32)),
    (pdo.PDOConv(3, fields.regular(P4), fields.trivial(P4), use_bias=True), np.zeros((1, 5, 5, 2, 4), np.float32)),
], ids=["lifting", "group", "steerable"])
def test_bias_is_one_number_for_each_feature(layer, x):
    """An input of 0 gives the bias, the same at every point and orientation; it starts at 0."""
    variables = jit(layer.init)(jax.random.key(0), x)
    bias = variables["params"]["bias"]
    assert bias.shape == (3,) and not bias.any()
    variables["params"]["bias"] = jnp.array([1.0, 2.0, 3.0])
    y = np.asarray(jit(layer.apply)(variables, x))
    np.testing.assert_array_equal(y, np.broadcast_to(np.array([1.0, 2.0, 3.0])[:, None], y.shape))


@pytest.mark.parametrize("group, order", [(P8, 2), (P4M, 3), (LINE, 4)], ids=["p8", "p4m", "line"])
@pytest.mark.parametrize("lifted", [False, True])
def test_steerable_convolution_spans_the_orbit_layers(group, order, lifted):
    """PDOConv trivial → regular (regular → regular) and LiftingConv (GroupConv) with an int basis are the same functions.

    Each layer is linear in its parameters: the responses to all unit parameters span one space.
    """
    in_rep, out_rep = fields.regular(group) if lifted else fields.trivial(group), fields.regular(group)
    orbit = (pdo.GroupConv if lifted else pdo.LiftingConv)(1, group, basis=order)
    steered = pdo.PDOConv(1, in_rep, out_rep, order=order)
    # a delta in each component, for its kernel
    x = np.zeros((in_rep.dim, *(5, 5)[:group.dim], 1, in_rep.dim), np.float32)
    x[(np.arange(in_rep.dim), *[2] * group.dim, 0, np.arange(in_rep.dim))] = 1
    responses = []
    for layer, argument in ((orbit, x if lifted else x[..., 0]), (steered, x)):
        size = jax.eval_shape(layer.init, jax.random.key(0), argument)["params"]["kernel"].shape
        unit = np.eye(math.prod(size), dtype=np.float32).reshape(-1, *size)
        rows = jit(jax.vmap(lambda w, layer=layer, argument=argument: layer.apply({"params": {"kernel": w}}, argument)))(unit)
        responses.append(np.asarray(rows).reshape(len(unit), -1))
    ranks = [np.linalg.matrix_rank(r, tol=1e-3) for r in (*responses, np.concatenate(responses))]
    assert ranks == [len(responses[0])] * 3 and len(responses[0]) == len(responses[1])


GOOD = np.zeros((1, 6, 6, 2, 4), np.float32)


@pytest.mark.parametrize("layer, x, message", [
    (pdo.LiftingConv(1, P4), GOOD, r"\[batch, \*space, channels\].*\(1, 6, 6, 2, 4\)"),
    (pdo.LiftingConv(1, CUBE), GOOD[..., 0], "3 axes of space"),
    (pdo.GroupConv(1, P4), GOOD[..., 0], r"channels, 4\].*\(1, 6, 6, 2\)"),
    (pdo.GroupConv(1, P8), GOOD, r"channels, 8\].*\(1, 6, 6, 2, 4\)"),
    (pdo.GroupConv(1, CUBE), GOOD, "3 axes of space"),
    (pdo.PDOConv(1, fields.standard(P4), fields.trivial(P4)), GOOD, r"channels, 2\]"),
    (pdo.PDOConv(1, fields.regular(P4), fields.trivial(P8)), GOOD, "one group"),
    (pdo.PDOConv(1, fields.regular(P4), fields.standard(P4), use_bias=True), GOOD, "bias"),
    (pdo.PDOConv(1, fields.trivial(P6M), fields.determinant(P6M)), GOOD[..., :1], "no equivariant operator"),
    (pdo.GroupConv(1, P4, padding="SMAE"), GOOD, "\"SAME\", \"VALID\", 'CIRCULAR'.* or numbers, got 'SMAE'"),
    (pdo.GroupConv(1, P4, padding=-1), GOOD, "padding must be an int >= 0"),
    (pdo.GroupConv(1, P4, padding=(1, 1, 1)), GOOD, "each of 2 axes"),
    (pdo.GroupConv(1, P4, padding=((1, 1, 1), 1)), GOOD, "each of 2 axes"),
    (pdo.GroupConv(1, P4, padding=1.5), GOOD, "padding must be an int"),
    (pdo.GroupConv(1, P4, strides="2"), GOOD, "strides must be an int >= 1.*'2'"),
    (pdo.GroupConv(1, P4, strides=0), GOOD, "strides must be an int >= 1"),
    (pdo.GroupConv(1, P4, strides=(1, 2, 1)), GOOD, "each of 2 axes"),
    (pdo.GroupConv(1, P4, strides=True), GOOD, "strides must be an int"),
    (pdo.GroupConv(1, P4, kernel_size=9, padding="VALID"), GOOD, "size 9 does not fit"),
    (pdo.GroupConv(1, P4, kernel_size=15, padding="CIRCULAR"), GOOD, "CIRCULAR padding by .*larger input"),
    (pdo.GroupConv(1, P4, kernel_size=4), GOOD, "odd positive int"),
    (pdo.GroupConv(1, P4, lowering="fastest"), GOOD, "lowering must be one of"),
    (pdo.GroupConv(1, P4, dtype=jnp.int32), GOOD, "floating"),
    (pdo.GroupConv(1, P4), GOOD.astype(np.complex64), "floating"),
    (pdo.GroupConv(1, P4, dtype="float33"), GOOD, "float33"),
    (pdo.GroupConv(1, P4, rank=0), GOOD, "rank must be None, or an int from 1 to 8 .*got 0"),
    (pdo.GroupConv(1, P4, rank=9), GOOD, "from 1 to 8 .*got 9"),
    (pdo.GroupConv(2, P4, rank=1, feature_group_count=2), GOOD, "rank does not go with feature_group_count"),
])
def test_bad_input_is_named(layer, x, message):
    """A wrong number of axes, a wrong group axis, or an impossible option: an error that names what was given and expected."""
    with pytest.raises((ValueError, TypeError), match=message):
        jax.eval_shape(layer.init, jax.random.key(0), x)
