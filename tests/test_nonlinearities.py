"""Norms and nonlinearities of fields: equivariance, statistics, dtypes, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pdo_jax import fields, groups, layers, nonlinearities

P8, P4M, CUBE = groups.cyclic(8), groups.dihedral(4), groups.octahedral()
REPS = {
    "trivial": fields.trivial(P8), "regular": fields.regular(P8), "quotient": fields.quotient(P4M, [0, 4]),
    "determinant": fields.determinant(P4M), "vector": fields.standard(P4M), "solid vector": fields.standard(CUBE),
    "irreps": fields.direct_sum(fields.irreps(CUBE)), "band limited": fields.band_limited(groups.cyclic(9), 2),
    "mixed": fields.direct_sum([fields.standard(P4M), fields.regular(P4M), fields.trivial(P4M), fields.determinant(P4M)]),
    "interleaved": None,
}
_mixed = REPS["mixed"]
_order = np.random.default_rng(3).permutation(_mixed.dim)
REPS["interleaved"] = fields.Representation("interleaved", P4M, _mixed.matrices[:, _order][:, :, _order])
ALL = pytest.mark.parametrize("rep", REPS.values(), ids=REPS)


def field(rep, channels=3, batch=4, seed=0, dtype=jnp.float32):
    size = (batch, *(4, 4, 4)[:rep.group.dim], channels, rep.dim)
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 2.0, size=size), dtype)


def act(x, rep, a):
    """ρ(A) on the values, and A on the grid where it maps it to itself."""
    x = np.asarray(x)
    matrix = rep.group.elements[a]
    if rep.group.preserves_grid[a]:
        source = np.abs(matrix).argmax(1)
        x = np.transpose(x, [0, *(1 + source), *range(1 + len(source), x.ndim)])
        x = np.flip(x, [1 + i for i in range(len(source)) if matrix[i, source[i]] < 0])
    return x @ rep.matrices[a].T.astype(np.float32)


def randomised(variables, seed=1):
    """Random positive parameters and statistics, so that nothing is equivariant by being constant."""
    leaves, tree = jax.tree.flatten(variables)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(random.uniform(0.2, 1.5, v.shape), v.dtype) for v in leaves])


@ALL
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_equivariant(rep, train):
    """f(A·x) = A·f(x) for every A, with the batch's statistics and with the running ones, which A leaves alone."""
    norm, x = nonlinearities.FieldBatchNorm(rep), field(rep)
    variables = randomised(norm.init(jax.random.key(0), x, train=True))
    apply = jax.jit(lambda x: norm.apply(variables, x, train=train, mutable="batch_stats"))
    y, state = apply(x)
    assert y.shape == x.shape
    for a in range(rep.group.order):
        turned, turned_state = apply(act(x, rep, a))
        np.testing.assert_allclose(turned, act(y, rep, a), atol=2e-5)
        jax.tree.map(lambda s, t: np.testing.assert_allclose(s, t, rtol=1e-5), state, turned_state)


@ALL
def test_norm_nonlinearity_is_equivariant(rep):
    """f(A·x) = A·f(x) for every A and random biases of both signs."""
    layer, x = nonlinearities.NormNonlinearity(rep), field(rep)
    variables = jax.tree.map(lambda v: 4 * (v - 0.8), randomised(layer.init(jax.random.key(0), x)))
    apply = jax.jit(lambda x: layer.apply(variables, x))
    y = apply(x)
    assert y.shape == x.shape and float(jnp.abs(y - x).max()) > 0.1
    for a in range(rep.group.order):
        np.testing.assert_allclose(apply(act(x, rep, a)), act(y, rep, a), atol=2e-5)


@ALL
def test_gate_is_equivariant(rep):
    """f(A·x) = A·f(x), the gates being trivial fields; one for each block."""
    layer = nonlinearities.GatedNonlinearity(rep)
    x = field(layer.in_rep)
    apply = jax.jit(lambda x: layer.apply({}, x))
    y = apply(x)
    assert y.shape == (*x.shape[:-1], rep.dim)
    for a in range(rep.group.order):
        np.testing.assert_allclose(apply(act(x, layer.in_rep, a)), act(y, rep, a), atol=2e-5)


def test_gate_by_hand():
    """Each block times the sigmoid of its own gate."""
    rep = fields.direct_sum([fields.standard(P8), fields.trivial(P8)])
    x = jnp.array([1.0, 2.0, 3.0, 0.5, -1.0]).reshape(1, 1, 1, 1, 5)
    sigmoid = 1 / (1 + np.exp([-0.5, -0.5, 1.0]))
    np.testing.assert_allclose(nonlinearities.GatedNonlinearity(rep).apply({}, x).ravel(), [1, 2, 3] * sigmoid, rtol=1e-6)


@pytest.mark.parametrize("name", ["trivial", "regular", "quotient"])
def test_pointwise_where_values_are_permuted(name):
    """The function itself, and it commutes with the group."""
    rep = REPS[name]
    fn = nonlinearities.pointwise(rep, nn.relu)
    assert fn is nn.relu
    x = field(rep)
    for a in np.flatnonzero(rep.group.preserves_grid):
        np.testing.assert_allclose(fn(act(x, rep, a)), act(fn(x), rep, a), atol=1e-6)


@pytest.mark.parametrize("name", ["determinant", "vector", "irreps", "band limited", "mixed"])
def test_pointwise_is_refused_elsewhere(name):
    """A representation that mixes or negates values: an error that names it and what to take instead."""
    with pytest.raises(ValueError, match="NormNonlinearity or GatedNonlinearity"):
        nonlinearities.pointwise(REPS[name])


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_of_regular_fields_is_group_batch_norm(train):
    """One mean and variance per channel over batch, space and group: equal results and running statistics."""
    x = field(REPS["regular"])
    ours, theirs = nonlinearities.FieldBatchNorm(REPS["regular"]), layers.GroupBatchNorm(REPS["regular"])
    expected = theirs.init_with_output(jax.random.key(0), x, train=train)
    found = ours.init_with_output(jax.random.key(0), x, train=train)
    np.testing.assert_array_equal(found[0], expected[0])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]))


@pytest.mark.parametrize("name", ["determinant", "vector", "irreps", "interleaved"])
def test_batch_norm_normalises(name):
    """In training every block has mean square 1 per channel, and mean 0 where the mean is invariant."""
    rep = REPS[name]
    norm, x = nonlinearities.FieldBatchNorm(rep), field(rep, batch=16)
    y, _ = norm.init_with_output(jax.random.key(0), x, train=True)
    for block in rep.blocks:
        part = np.moveaxis(np.asarray(y[..., block]), -2, 0).reshape(x.shape[-2], -1)
        np.testing.assert_allclose((part ** 2).mean(1), 1, rtol=1e-3)
        if fields.permutes(rep.matrices[:, block][:, :, block]):
            np.testing.assert_allclose(part.mean(1), 0, atol=1e-5)


def test_running_statistics_converge():
    """After many steps on one batch evaluation gives what training gives."""
    rep = REPS["mixed"]
    norm, x = nonlinearities.FieldBatchNorm(rep, momentum=0.5), field(rep)
    variables = norm.init(jax.random.key(0), x, train=True)
    for _ in range(40):
        y, state = norm.apply(variables, x, train=True, mutable="batch_stats")
        variables = {**variables, **state}
    np.testing.assert_allclose(norm.apply(variables, x, train=False), y, atol=1e-5)


def test_statistics_over_a_mapped_axis():
    """With ``axis_name`` two halves of a batch are normalised as the whole."""
    rep = REPS["mixed"]
    x = field(rep)
    norm = nonlinearities.FieldBatchNorm(rep, axis_name="devices")
    variables = nonlinearities.FieldBatchNorm(rep).init(jax.random.key(0), x, train=True)
    expected, state = nonlinearities.FieldBatchNorm(rep).apply(variables, x, train=True, mutable="batch_stats")
    halves, states = jax.vmap(lambda half: norm.apply(variables, half, train=True, mutable="batch_stats"), axis_name="devices")(
        x.reshape(2, -1, *x.shape[1:]))
    np.testing.assert_allclose(halves.reshape(x.shape), expected, atol=1e-5)
    jax.tree.map(lambda s, t: np.testing.assert_allclose(s, t[0], atol=1e-5), state, states)


@pytest.mark.parametrize("name", ["regular", "solid vector", "interleaved"])
def test_bfloat16(name):
    """Input in bfloat16 gives bfloat16, near the float32 result; parameters and statistics stay float32."""
    rep = REPS[name]
    for layer, options in [(nonlinearities.FieldBatchNorm(rep), {"train": True}), (nonlinearities.NormNonlinearity(rep), {})]:
        x = field(rep)
        y, variables = layer.init_with_output(jax.random.key(0), x.astype(jnp.bfloat16), **options)
        assert y.dtype == jnp.bfloat16
        assert {v.dtype for v in jax.tree.leaves(variables)} <= {jnp.dtype(jnp.float32)}
        expected = layer.init_with_output(jax.random.key(0), x, **options)[0]
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.06, rtol=0.02)
    gate = nonlinearities.GatedNonlinearity(rep)
    assert gate.apply({}, field(gate.in_rep, dtype=jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["regular", "vector", "interleaved"])
def test_gradients_are_finite_where_a_field_vanishes(name):
    """Zero input, for instance in padding, gives no NaN in any gradient."""
    rep = REPS[name]
    x = jnp.zeros_like(field(rep))
    for layer, options in [(nonlinearities.FieldBatchNorm(rep), {"train": False}), (nonlinearities.NormNonlinearity(rep), {})]:
        variables = layer.init(jax.random.key(0), x, **options)

        def loss(variables, x, layer=layer, options=options):
            return (layer.apply(variables, x, **options) ** 2 + x).sum()

        grads = jax.jit(jax.grad(loss, (0, 1)))(variables, x)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_norm_nonlinearity_by_hand():
    """Vectors get shorter by the bias and vanish below it; permuted values take ReLU(x + b)."""
    rep = fields.direct_sum([fields.standard(P8), fields.trivial(P8)])
    layer = nonlinearities.NormNonlinearity(rep, bias_init=nn.initializers.constant(-1.0), epsilon=0.0)
    x = jnp.array([[3.0, 4.0, 5.0], [0.3, 0.4, -5.0]]).reshape(1, 1, 2, 1, 3)
    y, _ = layer.init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y.reshape(2, 3), [[2.4, 3.2, 4.0], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("layer, options", [
    (nonlinearities.FieldBatchNorm, {"train": True}), (nonlinearities.NormNonlinearity, {}),
    (nonlinearities.GatedNonlinearity, {})])
def test_bad_fields(layer, options):
    """A field of another size or dimension: an error that names the layer, the representation and both shapes."""
    rep = fields.standard(P8)
    for shape in [(2, 5, 5, 3, 8), (2, 5, 5, 2), (2, 5, 5, 5, 3, 7)]:
        with pytest.raises(ValueError, match=r"standard.* of Group\(p8.*takes a field \[.*, channels, \d\].*got shape"):
            layer(rep).init(jax.random.key(0), jnp.ones(shape), **options)


@pytest.mark.parametrize("layer, options", [
    (nonlinearities.FieldBatchNorm, {"train": True}), (nonlinearities.NormNonlinearity, {})])
def test_lengths_need_an_orthogonal_representation(layer, options):
    """Where the group changes lengths they cannot be used: a clear error."""
    skew = np.array([[1.0, 0.7], [0.0, 2.0]])
    rep = fields.Representation("skew", P8, skew @ P8.elements @ np.linalg.inv(skew))
    with pytest.raises(ValueError, match="measures lengths.*skew"):
        layer(rep).init(jax.random.key(0), jnp.ones((2, 5, 5, 3, 2)), **options)


# Norms of one example


def per_channel(rep):
    """Parameters away from their start, by name."""
    return {f"{name}_{k}": np.linspace(0.5, 2, 4).astype(np.float32) + k for k, part in enumerate(rep.parts)
            for name in (("scale", "bias") if part.is_permutation else ("scale",))}


@ALL
@pytest.mark.parametrize("options", [dict(), dict(num_groups=2), dict(num_groups=1, space=False)], ids=str)
def test_field_norm_is_equivariant(rep, options):
    """Instance, group and layer norm commute with every element, those that do not preserve the grid acting on values alone."""
    norm, x, variables = nonlinearities.FieldNorm(rep, **options), field(rep, channels=4), {"params": per_channel(rep)}
    call = jax.jit(lambda x: norm.apply(variables, x))
    y = call(x)
    for a in range(rep.group.order):
        np.testing.assert_allclose(call(act(x, rep, a)), act(y, rep, a), atol=1e-4)
    for k in range(len(x)):  # no example sees another
        np.testing.assert_allclose(call(x[k:k + 1]), y[k:k + 1], atol=1e-5)


@pytest.mark.parametrize("options, theirs", [
    (dict(), nn.InstanceNorm(epsilon=1e-5)), (dict(num_groups=2), nn.GroupNorm(2, epsilon=1e-5)),
    (dict(num_groups=1, space=False), nn.LayerNorm(epsilon=1e-5))], ids=["instance", "group", "layer"])
def test_field_norm_of_scalars_is_flax(options, theirs):
    """On scalars, and on fields of the trivial representation, Flax's norms with the same scale and bias."""
    x = field(REPS["trivial"], channels=4)
    params = per_channel(REPS["trivial"])
    expected = theirs.apply({"params": {"scale": params["scale_0"], "bias": params["bias_0"]}}, x[..., 0])
    for on, given in ((P8, x[..., 0]), (REPS["trivial"], x)):
        y = nonlinearities.FieldNorm(on, **options).apply({"params": params}, given)
        np.testing.assert_allclose(y.reshape(expected.shape), expected, atol=1e-4)
    with pytest.raises(ValueError, match="num_groups=3 of FieldNorm must divide its 4 channels"):
        nonlinearities.FieldNorm(P8, num_groups=3).init(jax.random.key(0), x[..., 0])


@pytest.mark.parametrize("norm", [
    layers.GroupBatchNorm(P8), nonlinearities.FieldBatchNorm(fields.direct_sum([fields.standard(P8), fields.regular(P8)])),
    nonlinearities.FieldNorm(P8, num_groups=1),
    nonlinearities.FieldNorm(fields.direct_sum([fields.standard(P8), fields.regular(P8)]))], ids=lambda n: type(n).__name__)
def test_masked_points_do_not_count(norm):
    """Images padded by rubbish, with a mask: the outputs and statistics of the images without, and 0 where they were padded."""
    rep = getattr(norm, "rep", getattr(norm, "group", None))
    size = rep.dim if isinstance(rep, fields.Representation) else rep.order
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(3, 4, 5, 4, size)), jnp.float32)
    wide = jnp.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0), (0, 0)), constant_values=jnp.nan)
    mask = np.pad(np.ones((3, 4, 5), bool), ((0, 0), (1, 0), (0, 2)))
    options = {"train": True} if "Batch" in type(norm).__name__ else {}
    variables = jax.jit(lambda x: norm.init(jax.random.key(0), x, **options))(x)
    apply = jax.jit(lambda x, mask: norm.apply(variables, x, mask=mask, mutable="batch_stats", **options))
    expected, stats = apply(x, None)
    for m in (mask, mask[0]):
        found, found_stats = apply(wide, m)
        np.testing.assert_allclose(found[:, 1:, :5], expected, atol=1e-4)
        assert not np.asarray(found)[~mask].any()
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5), found_stats, stats)
        assert np.isfinite(jax.grad(lambda x, m=m: (apply(x, m)[0] ** 2).sum())(wide)).all()
    with pytest.raises(ValueError, match=r"a mask of a field of shape .* has shape \(3, 5, 7\) or \(5, 7\), got \(3, 5, 6\)"):
        norm.apply(variables, wide, mask=mask[..., 1:], mutable="batch_stats", **options)


# Fourier


@pytest.mark.parametrize("rep, subgroup", [
    (REPS["band limited"], [0]), (REPS["irreps"], [0]), (fields.band_limited(groups.dihedral(13), 4), [0]),
    (fields.direct_sum([REPS["trivial"], fields.standard(P8)] * 1), [0]),
    (fields.band_limited(groups.icosahedral(), 2, 1), [0, 1, 2, 3, 4]),
    (fields.band_limited(groups.icosahedral(), 1, 3), groups.tetrahedral())], ids=str)
def test_fourier(rep, subgroup):
    """Exactly equivariant under every sampled element, the identity of the identity, and no linear map of a ReLU."""
    if isinstance(subgroup, groups.Group):
        with pytest.raises(ValueError, match="5 samples do not determine"):
            nonlinearities.fourier(rep, subgroup=subgroup)
        return
    x = np.random.default_rng(0).normal(size=(6, rep.dim)).astype(np.float32)
    call = jax.jit(nonlinearities.fourier(rep, subgroup=subgroup))
    y = call(x)
    for a in range(rep.group.order):
        turn = rep.matrices[a].T.astype(np.float32)
        np.testing.assert_allclose(call(x @ turn), y @ turn, atol=2e-5)
    np.testing.assert_allclose(nonlinearities.fourier(rep, lambda x: x, subgroup)(x), x, atol=1e-5)
    assert np.abs(call(-x) + y).max() > 0.1


def test_more_samples_bring_a_fourier_nonlinearity_near_the_continuous_group():
    """A field of SO(2) turned by an angle between the samples: the error falls with their number."""
    x, t, errors = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32), 0.1, []
    turn = np.eye(5, dtype=np.float32)
    for k in (1, 2):
        turn[2 * k - 1:2 * k + 1, 2 * k - 1:2 * k + 1] = [[np.cos(k * t), -np.sin(k * t)], [np.sin(k * t), np.cos(k * t)]]
    for n in (9, 18, 72):
        call = nonlinearities.fourier(fields.band_limited(groups.cyclic(n), 2), nn.relu)
        errors.append(np.abs(call(x @ turn.T) - call(x) @ turn.T).max())
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 2e-3


def test_a_fourier_nonlinearity_needs_orthogonal_parts_that_samples_tell():
    skewed = fields.Representation("skewed", P4M, [[[1, 1], [0, 1]] @ a @ [[1, -1], [0, 1]] for a in P4M.elements])
    for rep in (skewed, fields.direct_sum([fields.trivial(P8)] * 2)):
        with pytest.raises(ValueError, match="samples do not determine a field"):
            nonlinearities.fourier(rep)
