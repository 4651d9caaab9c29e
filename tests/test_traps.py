"""Inputs that once gave wrong numbers in silence, and what is right."""

import functools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit

import pdo_jax as pdo
from pdo_jax import fields, groups, kernels, nonlinearities, stencils

P4, P8, P4M = groups.cyclic(4), groups.cyclic(8), groups.dihedral(4)
SCALARS, FIELD = (2, 8, 8, 3), (2, 8, 8, 3, 4)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Numbers.


@pytest.mark.parametrize("mean, spread", [(300.0, 0.05), (-1e4, 1.0), (0.0, 1e-3)])
def test_batch_norm_where_the_mean_is_far_larger_than_the_spread(mean, spread):
    """Output of mean 0 and variance 1, and gradients, are those of numpy's float64."""
    x = mean + spread * normal(16, 8, 8, 2, 4)
    norm, weight = pdo.GroupBatchNorm(P4, epsilon=0.0), normal(*x.shape, seed=1)
    variables = norm.init(jax.random.key(0), x, True)
    run = lambda x: norm.apply(variables, x, True, mutable="batch_stats")[0]
    y, dx = jit(lambda x: (run(x), jax.grad(lambda x: (run(x) * weight).sum())(x)))(x)
    wide, w, axes = np.asarray(x, np.float64), np.asarray(weight, np.float64), (0, 1, 2, 4)
    mu, sigma = wide.mean(axes, keepdims=True), wide.std(axes, keepdims=True)
    z = (wide - mu) / sigma
    np.testing.assert_allclose(y, z, atol=1e-2)
    expected = (w - w.mean(axes, keepdims=True) - z * (w * z).mean(axes, keepdims=True)) / sigma
    np.testing.assert_allclose(dx, expected, atol=1e-2 * np.abs(expected).max())


def test_gradients_flow_through_the_statistics():
    """A loss of the updated averages has the gradient that flax.linen.BatchNorm gives."""
    x = normal(4, 5, 5, 3, 8)
    ours, theirs = pdo.GroupBatchNorm(P8), nn.BatchNorm(use_running_average=False, axis=-2, momentum=0.9)

    def loss(norm, variables, x, *arguments):
        new = norm.apply(variables, x, *arguments, mutable="batch_stats")[1]["batch_stats"]
        return (new["mean"] ** 2 + jnp.sin(new["var"])).sum()

    found, expected = (jax.grad(functools.partial(loss, norm, norm.init(jax.random.key(0), x, *arguments)))(x, *arguments)
                       for norm, arguments in ((ours, (True,)), (theirs, ())))
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_means_of_float16_do_not_overflow():
    """Sums are in float32, results in float16: means of 3e4 stay."""
    x = jnp.full(FIELD, 3e4, jnp.float16)
    for y in (pdo.mean_pool(x, P4), pdo.blur_pool(x, P4), pdo.group_pool(x, P4)):
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(y.astype(jnp.float32), 3e4, rtol=1e-3)


def test_whole_numbers_become_float32():
    """Means and norms of integers are not cut to integers; a maximum stays one."""
    x = jnp.arange(np.prod(FIELD)).reshape(FIELD) % 7
    norm = pdo.GroupBatchNorm(P4)
    for y in (pdo.mean_pool(x, P4), pdo.blur_pool(x, P4), pdo.group_pool(x, P4), norm.init_with_output(
            jax.random.key(0), x, True)[0], nonlinearities.NormNonlinearity(fields.regular(P4)).init_with_output(
            jax.random.key(0), x)[0]):
        assert y.dtype == jnp.float32
    np.testing.assert_allclose(pdo.mean_pool(x, P4), pdo.mean_pool(x.astype(jnp.float32), P4))
    assert pdo.max_pool(x, P4).dtype == x.dtype


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1.0])
def test_a_norm_nonlinearity_lives_at_any_size(size):
    """A small field passes, and the bias has a gradient."""
    layer, x = nonlinearities.NormNonlinearity(fields.standard(P8)), size * normal(2, 4, 4, 3, 2)
    variables = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda v: jnp.abs(layer.apply(v, x)).sum())(variables)["params"]["bias"]
    assert (layer.apply(variables, x) != 0).all() and (np.abs(gradient) > 1).all()


@pytest.mark.parametrize("order, size", [(4, 5), (4, 7), (4, 9), (2, 5)])
def test_central_differences_use_their_room(order, size):
    """Accuracy rises with the size: derivatives of a plane wave to h^(size + 1 - order), the stencils reaching the border."""
    bank = kernels.bank(P4, size, order)
    assert all(np.abs(np.take(bank.stencils, side, axis)).max() > 1e-3 for side in (0, -1) for axis in (1, 2))
    errors = []
    for h in (0.2, 0.1):
        grid = h * (np.arange(size) - size // 2)
        wave = np.sin(grid[:, None] + 0.5 * grid + 0.3)
        slopes = np.array([np.tensordot(w, wave, 2) / h ** sum(a) for a, w in zip(bank.indices, bank.stencils, strict=True)])
        exact = np.array([0.5 ** a[1] * np.sin(0.3 + sum(a) * np.pi / 2) for a in bank.indices])
        errors.append(np.abs(slopes - exact).max())
    assert size + 1 - order - 0.4 < np.log2(errors[0] / errors[1])


# What was taken for something else.

CALLS = {  # each must be refused, and the message say what to do
    "max_pool of another field": (lambda: pdo.max_pool(normal(2, 8, 8, 3, 5), P4), r"\[batch, \*space, channels, 4\]"),
    "max_pool without a group": (lambda: pdo.max_pool(normal(*FIELD), 2), "expected a Group"),
    "max_pool of vectors": (lambda: pdo.max_pool(normal(2, 8, 8, 3, 2), fields.standard(P4)), "use mean_pool"),
    "group_pool of scalars": (lambda: pdo.group_pool(normal(*SCALARS), P4), r"takes a field .*got shape \(2, 8, 8, 3\)"),
    "group_pool of vectors": (lambda: pdo.group_pool(normal(2, 8, 8, 3, 2), fields.standard(P4)), "permutes"),
    "blur_pool of one dimension": (lambda: pdo.blur_pool(normal(2, 8, 3), P4), "2 axes of space"),
    "a norm of vectors": (lambda: init(pdo.GroupBatchNorm(fields.standard(P4)), normal(2, 8, 8, 3, 2), True), "FieldBatchNorm"),
    "a norm of 8 values under p4": (lambda: init(pdo.GroupBatchNorm(P4), normal(2, 8, 8, 3, 8), True), r"channels, 4\]"),
    "dropout of another field": (lambda: init(pdo.GroupDropout(0.1, P4), normal(2, 8, 8, 3, 8), False), r"channels, 4\]"),
    "a field into LiftingConv": (lambda: init(pdo.LiftingConv(2, P4), normal(*FIELD)), "goes into GroupConv"),
    "an image into GroupConv": (lambda: init(pdo.GroupConv(2, P4), normal(*SCALARS)), "LiftingConv first"),
    "no features": (lambda: init(pdo.LiftingConv(0, P4), normal(*SCALARS)), "LiftingConv must be an int >= 1, got 0"),
    "degrees": (lambda: init(pdo.LiftingConv(1, P4, frame=22.5), normal(*SCALARS)), r"math.radians\(22.5\)"),
    "a name for a group": (lambda: init(pdo.LiftingConv(1, "p8"), normal(*SCALARS)), "Group, such as .*got 'p8'"),
    "a group for a representation": (lambda: init(pdo.PDOConv(1, P4, P4), normal(*FIELD)), "must be a Representation"),
}


def init(layer, *arguments):
    return layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *arguments)


@pytest.mark.parametrize("name", CALLS)
def test_refused(name):
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_scalars_are_scalars():
    """Pools, norm and dropout of scalars act on [batch, *space, channels] as on a field of one value."""
    x, scalar = normal(*SCALARS), fields.trivial(P4)
    for pool in (pdo.max_pool, pdo.mean_pool, pdo.blur_pool):
        np.testing.assert_array_equal(pool(x, P4), pool(x[..., None], scalar)[..., 0])
    for layer in (pdo.GroupBatchNorm, functools.partial(pdo.GroupDropout, 0.5)):
        a, b = layer(P4), layer(scalar)
        y, _ = a.init_with_output({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, True)
        z, _ = b.init_with_output({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x[..., None], True)
        np.testing.assert_allclose(y, z[..., 0], atol=1e-6)


# Construction.


def test_sizes_may_be_numpy_integers():
    layer = pdo.LiftingConv(np.int64(2), P4, kernel_size=np.int64(5), basis=np.int64(2), strides=np.int64(2))
    assert layer.init_with_output(jax.random.key(0), normal(*SCALARS))[0].shape == (2, 4, 4, 2, 4)


@pytest.mark.parametrize("make", [functools.partial(pdo.LiftingConv, 2, P4), pdo.networks.ResNet])
@pytest.mark.parametrize("frame", [np.diag([1.0, -1.0]), jnp.eye(2), [[0.0, 1.0], [1.0, 0.0]], 0.3])
def test_modules_with_a_frame_can_be_compared_and_hashed(make, frame):
    one, other = make(frame=frame), make(frame=frame)
    assert one == other and hash(one) == hash(other) and one != make(frame=0.1)


def test_a_fresh_partial_is_the_scheme_that_says_the_same():
    """No new operator bank, no new program: the second call of an equal layer is as quick as that of the same one."""
    make = lambda: functools.partial(stencils.gaussian_derivative, sigma=1.1)
    assert kernels.bank(P8, 5, 2, make()) is kernels.bank(P8, 5, 2, make())
    variables = pdo.LiftingConv(2, P8, scheme=make()).init(jax.random.key(0), x := normal(*SCALARS))
    pdo.LiftingConv(2, P8, scheme=make()).apply(variables, x)
    began = time.perf_counter()
    pdo.LiftingConv(2, P8, scheme=make()).apply(variables, x)
    assert time.perf_counter() - began < 0.2


def test_equal_modules_are_one_static_argument():
    """A fresh module that says the same, its frame a matrix, is not traced again."""
    chex.clear_trace_counter()
    make = lambda: pdo.LiftingConv(2, groups.cyclic(4), frame=np.eye(2))
    variables = make().init(jax.random.key(0), x := normal(*SCALARS))
    run = jax.jit(chex.assert_max_traces(lambda layer, v, x: layer.apply(v, x), n=1), static_argnums=0)
    for _ in range(3):
        run(make(), variables, x)


def test_compiler_options_are_those_of_the_platform():
    """They compile on a CPU, and give the same numbers; elsewhere there are none."""
    assert pdo.compiler_options("tpu") == pdo.compiler_options("cuda") == {}
    layer, x = pdo.LiftingConv(2, P4), normal(*SCALARS)
    variables = layer.init(jax.random.key(0), x)
    plain, fast = (jax.jit(layer.apply, compiler_options=options)(variables, x)
                   for options in (None, pdo.compiler_options("cpu")))
    np.testing.assert_allclose(fast, plain, atol=1e-5)
