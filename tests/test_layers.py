"""Layers between the convolutions: batch norm against Flax's, dropout masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit

import pdo_jax as pdo
from pdo_jax import fields, groups, nonlinearities

LINE, P4, P8, P4M, O_H = groups.reflection(1), groups.cyclic(4), groups.cyclic(8), groups.dihedral(4), groups.octahedral(True)


def of(x):
    """The representation of a field that tells nothing but its sizes: every value of its last axis stands for itself."""
    group = groups.reflection(x.ndim - 3)
    return fields.direct_sum([fields.trivial(group)] * x.shape[-1])


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 2.0, size=shape), dtype)


def turn(x, group, a):
    """[A·F](x, B) = F(A^{-1}x, A^{-1}B) for an element that preserves the grid; in numpy, apart from the library's own."""
    matrix = np.rint(group.elements[a]).astype(int)
    source = np.abs(matrix).argmax(1)
    x = np.transpose(np.asarray(x), [0, *(1 + source), 1 + group.dim, 2 + group.dim])
    x = np.flip(x, [1 + i for i in range(group.dim) if matrix[i, source[i]] < 0])
    return x[..., group.table[group.inverse[a]]]


# Batch norm.


def norms(dtype=None, axis_name=None):
    """GroupBatchNorm, and what it stands for in Flax."""
    flax_norm = nn.BatchNorm(axis=-2, momentum=0.9, epsilon=1e-5, dtype=dtype, axis_name=axis_name)

    def ours(v, x, train):
        return pdo.GroupBatchNorm(of(x), dtype=dtype, axis_name=axis_name).apply(v, x, train, mutable="batch_stats")

    return (ours,
            lambda v, x, train: flax_norm.apply(v, x, use_running_average=not train, mutable="batch_stats"))


def norm_variables(channels):
    random = np.random.default_rng(5)
    scale, bias, mean, var = random.uniform(0.5, 2.0, size=(4, channels)).astype(np.float32)
    return {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}


def norm_results(norm, variables, x, train):
    """Output, new statistics, and the gradients to parameters and input of a random linear loss."""
    weight = normal(*x.shape, seed=7)

    def loss(params, x):
        y, new = norm({**variables, "params": params}, x, train)
        return (y.astype(jnp.float32) * weight).sum(), (y, new["batch_stats"])

    (_, (y, new)), (dparams, dx) = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables["params"], x)
    return {"y": y, **new, **{f"d{k}": v for k, v in dparams.items()}, "dx": dx}


def assert_same(found, expected, tolerance):
    for name, e in expected.items():
        f, e = np.asarray(found[name].astype(jnp.float32)), np.asarray(e.astype(jnp.float32))
        np.testing.assert_allclose(f, e, atol=tolerance * max(1, np.abs(e).max()), err_msg=name)


@pytest.mark.parametrize("shape", [(4, 9, 3, 2), (3, 5, 4, 3, 8), (2, 3, 4, 2, 3, 12), (16, 1, 3, 8)], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_equals_flax(shape, train):
    """Values, running statistics and gradients are those of nn.BatchNorm over the channel axis (-2), in float32."""
    variables, x = norm_variables(3), normal(*shape)
    found, expected = (norm_results(norm, variables, x, train) for norm in norms())
    assert found["y"].dtype == found["dx"].dtype == jnp.float32
    assert_same(found, expected, 1e-5)


def test_batch_norm_in_bfloat16():
    """Values and gradients agree with float32 to bfloat16's precision; statistics are float32 and agree closely."""
    variables, x = norm_variables(3), normal(8, 6, 6, 3, 8, dtype=jnp.bfloat16)
    found = norm_results(norms()[0], variables, x, True)
    assert found["y"].dtype == found["dx"].dtype == jnp.bfloat16 and found["mean"].dtype == found["dscale"].dtype == jnp.float32
    expected = norm_results(norms()[1], variables, x.astype(jnp.float32), True)
    assert_same(found, expected, 2e-2)
    assert_same({k: found[k] for k in ("mean", "var")}, {k: expected[k] for k in ("mean", "var")}, 1e-5)
    wide = norm_results(norms(dtype=jnp.float32)[0], variables, x, True)
    assert wide["y"].dtype == jnp.float32
    assert_same(wide, {k: v for k, v in expected.items() if k != "dx"}, 1e-5)


def test_batch_norm_at_initialisation():
    """Zero mean and unit variance of the output in training; the identity in evaluation; parameters one per channel."""
    x, norm = normal(8, 5, 5, 3, 8), pdo.GroupBatchNorm(P8)
    y, variables = norm.init_with_output(jax.random.key(0), x, True)
    np.testing.assert_allclose(y.mean((0, 1, 2, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 1, 2, 4)), 1, atol=1e-4)
    assert {k: sorted(v) for k, v in variables.items()} == {"params": ["bias", "scale"], "batch_stats": ["mean", "var"]}
    assert {v.shape for v in jax.tree.leaves(variables)} == {(3,)}
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
    np.testing.assert_allclose(norm.apply(variables, x, False), x, rtol=1e-4)


def test_batch_norm_over_a_mapped_axis_is_that_of_the_whole_batch():
    """With axis_name on a batch in two parts: outputs, statistics and gradients equal those of the batch in one."""
    variables, x, weight = norm_variables(3), normal(6, 4, 4, 3, 8), normal(6, 4, 4, 3, 8, seed=7)

    def loss(norm, params, x, weight):
        y, new = norm({**variables, "params": params}, x, True)
        return (y * weight).sum(), (y, new["batch_stats"])

    def gradients(norm, x, weight):  # parameters: of the local loss; the input: of the sum of all local losses
        return jax.value_and_grad(functools.partial(loss, norm), (0, 1), has_aux=True)(variables["params"], x, weight)

    parts = [v.reshape(2, 3, *v.shape[1:]) for v in (x, weight)]
    (values, (y, stats)), (dparams, dx) = jit(jax.vmap(
        functools.partial(gradients, norms(axis_name="data")[0]), axis_name="data"))(*parts)
    (value, (whole_y, whole_stats)), (whole_dparams, whole_dx) = jit(functools.partial(gradients, norms()[0]))(x, weight)
    np.testing.assert_allclose(values.sum(), value, rtol=1e-4)
    np.testing.assert_allclose(y.reshape(x.shape), whole_y, atol=1e-5)
    np.testing.assert_allclose(dx.reshape(x.shape), whole_dx, atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_allclose(stats[name], np.stack([whole_stats[name]] * 2), rtol=1e-5)
    for name in ("scale", "bias"):
        np.testing.assert_allclose(dparams[name].sum(0), whole_dparams[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group, space", [(LINE, (5,)), (P4M, (4, 4)), (O_H, (3, 3, 3))], ids=["line", "p4m", "O_h"])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_equivariant(group, space, train):
    """norm(A·F) = A·norm(F), and the statistics of A·F are those of F; so for any permutation of the group axis."""
    variables, x = norm_variables(2), np.asarray(normal(2, *space, 2, group.order))
    apply = jit(functools.partial(norms()[0], train=train))
    y, new = apply(variables, x)
    turned = [(turn(x, group, a), turn(y, group, a)) for a in range(1, group.order, 5)]
    shuffled = np.random.default_rng(0).permutation(group.order)
    for x_turned, expected in [*turned, (x[..., shuffled], np.asarray(y)[..., shuffled])]:
        found, found_new = apply(variables, x_turned)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5), found_new, new)


# Dropout.


@pytest.mark.parametrize("space", [(40,), (10, 7), (5, 4, 3)], ids=str)
@pytest.mark.parametrize("channels", [False, True])
def test_dropout_masks_are_shared_over_the_group(space, channels):
    """A point is kept, and divided by 1 - rate, for all orientations or for none; with channels=True so is all of space."""
    rate, x = 0.25, jnp.ones((40, *space, 5, 4))
    layer = pdo.GroupDropout(rate, of(x), channels=channels)
    y = np.asarray(jit(lambda key: layer.apply({}, x, True, rngs={"dropout": key}))(jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-4)
    shared = y[:, *[slice(0, 1)] * len(space), :, :1] if channels else y[..., :1]
    np.testing.assert_array_equal(y, np.broadcast_to(shared, y.shape))
    draws = shared.size
    assert abs((shared > 0).mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / draws)
    for axis in range(y.ndim - 1):  # and nothing else is shared
        if not (channels and 1 <= axis <= len(space)):
            assert (shared != np.roll(shared, 1, axis)).any()


def test_dropout_is_equivariant_to_the_group_axis():
    """With one random stream, dropout(A·F) = A·dropout(F) for a permutation A of the group axis: the mask does not see it."""
    x, shuffled = normal(3, 4, 4, 2, 8), np.random.default_rng(0).permutation(8)
    drop = jit(lambda x: pdo.GroupDropout(0.5, P8).apply({}, x, True, rngs={"dropout": jax.random.key(1)}))
    np.testing.assert_array_equal(drop(x[..., shuffled]), drop(x)[..., shuffled])


def test_dropout_in_evaluation_is_the_identity():
    """Without training, or at rate 0, nothing is dropped and no random stream is needed."""
    x = normal(2, 3, 3, 2, 4)
    np.testing.assert_array_equal(pdo.GroupDropout(0.5, P4).apply({}, x, False), x)
    np.testing.assert_array_equal(pdo.GroupDropout(0.0, P4).apply({}, x, True), x)


@pytest.mark.parametrize("rate", [1e-7, 1 - 1e-7])
def test_dropout_at_extreme_rates(rate):
    """Rates beyond the mask's resolution are allowed and do what is next to them; bfloat16 stays bfloat16."""
    x = jnp.ones((2, 3, 3, 2, 4), jnp.bfloat16)
    y = pdo.GroupDropout(rate, P4).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, x if rate < 0.5 else 0 * x)


@pytest.mark.parametrize("rate", [1.0, -0.1, 2, float("nan")])
def test_bad_rates_are_named(rate):
    """A rate outside [0, 1) raises ValueError, in evaluation too."""
    for train in (True, False):
        with pytest.raises(ValueError, match=r"\[0, 1\), got"):
            pdo.GroupDropout(rate, P4).apply({}, jnp.ones((1, 2, 2, 1, 4)), train, rngs={"dropout": jax.random.key(0)})


# Told at construction, or at every call.


class Composed(nn.Module):
    """The layers of ``sequence``, each told at its call whether it trains."""

    @nn.compact
    def __call__(self, x, train):
        x = pdo.LiftingConv(2, P4, kernel_size=3, name="layers_0")(x)
        x = nn.relu(pdo.GroupBatchNorm(P4, name="layers_1")(x, train))
        x = pdo.max_pool(pdo.GroupDropout(0.5, P4, name="layers_3")(x, train=train), P4)
        return nonlinearities.FieldBatchNorm(fields.regular(P4), name="layers_5")(x, train)


def sequence(train):
    return nn.Sequential([
        pdo.LiftingConv(2, P4, kernel_size=3), pdo.GroupBatchNorm(P4, use_running_average=not train), nn.relu,
        pdo.GroupDropout(0.5, P4, deterministic=not train), functools.partial(pdo.max_pool, group=P4),
        nonlinearities.FieldBatchNorm(fields.regular(P4), use_running_average=not train)])


@pytest.mark.parametrize("train", [True, False])
def test_layers_in_a_sequence(train):
    """Layers told at their construction whether they train give, in nn.Sequential, the outputs and statistics of those told at
    their call, from the same variables; training and evaluation differ."""
    x, keys = normal(3, 6, 6, 1), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jit(sequence(True).init)(keys, x)
    run = lambda network, *told: jit(lambda v, x: network.apply(v, x, *told, rngs=keys, mutable="batch_stats"))(variables, x)
    found, expected, other = run(sequence(train)), run(Composed(), train), run(sequence(not train))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (found, other)), strict=True))


@pytest.mark.parametrize("layer, attribute", [
    (pdo.GroupBatchNorm(P4), "use_running_average"), (pdo.GroupDropout(0.5, P4), "deterministic"),
    (nonlinearities.FieldBatchNorm(fields.standard(P4)), "use_running_average")], ids=lambda v: type(v).__name__)
def test_a_layer_is_told_once_whether_it_trains(layer, attribute):
    """Neither at construction nor at the call, or at both: a ValueError that names both ways."""
    x = jnp.ones((1, 4, 4, 2, 2 if isinstance(layer, nonlinearities.FieldBatchNorm) else 4))
    for given, train in ((layer, None), (layer.clone(**{attribute: True}), False), (layer.clone(**{attribute: False}), False)):
        with pytest.raises(ValueError, match=rf"{type(layer).__name__} must be told once.*train=.*{attribute}="):
            given.init({"params": jax.random.key(0)}, x, train)


@pytest.mark.parametrize("lacking, train, message", [
    ({"mutable": False}, True, r"GroupBatchNorm layers_1 trains, .*give apply mutable=\['batch_stats'\].* train=False"),
    ({"rngs": {}}, True, r"GroupDropout layers_3 trains, .*give apply rngs=\{'dropout': key\}, or .* train=False"),
    ({"batch_stats": {}}, False, "GroupBatchNorm layers_1 has no running averages: give apply all that init returned"),
])
def test_what_a_call_lacks_is_named(lacking, train, message):
    """Running averages that are missing or fixed, or no randomness: the layer, where it stands, and the remedy."""
    x, given = jnp.ones((1, 4, 4, 1)), {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}} | lacking
    variables = jax.eval_shape(lambda x: Composed().init(jax.random.key(0), x, False), x)
    if "batch_stats" in given:
        variables, given = {"params": variables["params"]}, {}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: Composed().apply(v, x, train, **given), variables)
