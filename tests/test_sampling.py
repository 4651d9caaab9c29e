"""Sampling: pools and upsampling against plain loops, their sizes, and every symmetry of the grid, exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from test_layers import LINE, O_H, P4, P4M, normal, of, turn

import pdo_jax as pdo
from pdo_jax import fields


def pool(function, *window, **options):
    return lambda x: function(x, of(x), *window, **options)


def finer(method, change):
    """Upsampling to sizes 2n + change."""
    return lambda x: pdo.upsample(x, of(x), 2, method, sizes=[2 * n + change for n in x.shape[1:-2]])


POOLS = {
    "max": pool(pdo.max_pool), "mean": pool(pdo.mean_pool), "blur": pool(pdo.blur_pool), "max 3": pool(pdo.max_pool, 3),
    "max 3/2": pool(pdo.max_pool, 3, 2), "mean 3/2": pool(pdo.mean_pool, 3, 2), "mean 2/1": pool(pdo.mean_pool, 2, 1),
    "norm max": pool(pdo.norm_max_pool), "linear": pool(pdo.upsample), "linear 3": pool(pdo.upsample, 3),
    "nearest": pool(pdo.upsample, 2, "nearest"), "linear -1": finer("linear", -1), "linear +1": finer("linear", 1),
    "nearest -1": finer("nearest", -1), "nearest +1": finer("nearest", 1),
    "adaptive mean": pool(pdo.adaptive_pool, 2), "adaptive max": pool(pdo.adaptive_pool, 3, "max"),
    "antialiased max": lambda x: pdo.blur_pool(pdo.max_pool(x, of(x), 2, 1), of(x)),
}
PERIODIC = {
    "max": pool(pdo.max_pool, periodic=True), "mean 3/2": pool(pdo.mean_pool, 3, 2, periodic=True),
    "mean 5/1": pool(pdo.mean_pool, 4, 1, periodic=True), "norm max 4/2": pool(pdo.norm_max_pool, 4, 2, periodic=True),
    "blur": pool(pdo.blur_pool, periodic=True), "linear": pool(pdo.upsample, periodic=True),
    "nearest": pool(pdo.upsample, 2, "nearest", periodic=True),
}
SPACES = [(LINE, (6,)), (LINE, (7,)), (P4M, (6, 6)), (P4M, (7, 7)), (P4M, (6, 9)), (P4M, (5, 7)), (O_H, (4, 4, 4)),
          (O_H, (3, 5, 4))]


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("group, space", SPACES, ids=lambda v: str(getattr(v, "name", v)))
def test_pooling_keeps_every_symmetry_of_the_grid(pool, group, space):
    """pool(A·F) = A·pool(F) for every A that preserves the grid, on even, odd and rectangular grids; constants stay."""
    x = np.asarray(normal(2, *space, 1, group.order))
    pool = jit(pool)
    y = pool(x)
    for a in np.flatnonzero(group.preserves_grid):
        np.testing.assert_allclose(pool(turn(x, group, a)), turn(y, group, a), atol=1e-6)
    np.testing.assert_allclose(pool(np.full_like(x, 1.7)), 1.7, rtol=3e-6)


@pytest.mark.parametrize("pool, sizes", [
    (pool(pdo.max_pool), {2: 1, 3: 1, 6: 3, 7: 3, 28: 14}), (pool(pdo.mean_pool), {2: 1, 5: 2, 8: 4}),
    (pool(pdo.blur_pool), {1: 1, 2: 1, 5: 3, 6: 3}), (pool(pdo.max_pool, 3, 2), {3: 1, 4: 1, 7: 3, 8: 3}),
    (pool(pdo.mean_pool, 2, 1), {4: 3, 5: 4}), (pool(pdo.max_pool, 1), {4: 4}),
], ids=["max", "mean", "blur", "max 3/2", "mean 2/1", "max 1"])
def test_pooled_sizes(pool, sizes):
    """An even axis gives size / 2 points, an odd one (size - 1) / 2, a blurred one the ceiling; the dtype stays."""
    for size, expected in sizes.items():
        y = jax.eval_shape(pool, jnp.ones((2, size, size + 2, 3, 4), jnp.bfloat16))
        assert y.shape[1] == expected and (y.shape[0], *y.shape[3:]) == (2, 3, 4) and y.dtype == jnp.bfloat16


@pytest.mark.parametrize("shape, window, strides", [
    ((2, 6, 4, 2, 3), 2, None), ((2, 7, 6, 2, 3), 2, None), ((1, 7, 2, 1), 3, 2), ((1, 4, 5, 3, 2, 1), 2, 1),
    ((2, 9, 9, 1, 2), 3, 3)])
def test_pools_equal_a_plain_loop(shape, window, strides):
    """Maximum and mean over windows that start every ``strides`` points and are longer where the axis asks for it."""
    x, step = np.asarray(normal(*shape)), strides or window
    reach = [window + (s - window) % step for s in shape[1:-2]]
    counts = [(s - r) // step + 1 for s, r in zip(shape[1:-2], reach, strict=True)]
    for pool, reduce in ((pdo.max_pool, np.max), (pdo.mean_pool, np.mean)):
        y = np.asarray(jit(lambda x, pool=pool: pool(x, of(x), window, strides))(x))
        assert y.shape == (shape[0], *counts, *shape[-2:])
        for where in itertools.product(*map(range, counts)):
            box = tuple(slice(w * step, w * step + r) for w, r in zip(where, reach, strict=True))
            expected = reduce(x[(slice(None), *box)], axis=tuple(range(1, 1 + len(reach))))
            np.testing.assert_allclose(y[(slice(None), *where)], expected, atol=1e-6)


@pytest.mark.parametrize("space, window, strides", [((6, 4), 2, None), ((7, 6), 2, None), ((7, 7), 3, 2), ((9,), 3, None)])
def test_gradient_of_max_pool(space, window, strides):
    """The hand-written gradient equals automatic differentiation of slices; ties get equal shares, which is equivariant."""
    x = normal(2, *space, 2, 3)
    dy = normal(*jax.eval_shape(lambda x: pdo.max_pool(x, of(x), window, strides), x).shape, seed=1)

    def plain(x):  # one axis after another: a maximum of maxima
        for axis, size in enumerate(space, 1):
            step = strides or window
            reach = window + (size - window) % step
            views = [jax.lax.slice_in_dim(x, k, size - reach + k + 1, step, axis) for k in range(reach)]
            x = jnp.stack(views).max(0)
        return x

    found, expected = (jit(jax.grad(lambda x, f=f: (f(x) * dy).sum()))(x) for f in (
        lambda x: pdo.max_pool(x, of(x), window, strides), plain))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    flat = jit(jax.grad(lambda x: (pdo.max_pool(x, of(x), window, strides)).sum()))(jnp.ones_like(x))  # all tie
    np.testing.assert_allclose(flat, jnp.flip(flat, range(1, 1 + len(space))), atol=1e-6)
    np.testing.assert_allclose(flat.sum(), dy.size, rtol=1e-5)


@pytest.mark.parametrize("pool", [pdo.max_pool, pdo.mean_pool])
def test_bad_windows_are_named(pool):
    """A window larger than an axis, or one that is not positive, raises ValueError with the points."""
    x = jnp.ones((1, 5, 3, 2, 4))
    with pytest.raises(ValueError, match=r"window of 4 does not fit .*\(5, 3\)"):
        pool(x, P4, 4)
    for window, strides in ((0, None), (2, 0), (2, -1), (2.0, None)):
        with pytest.raises(ValueError, match="must be an int >= 1"):
            pool(x, P4, window, strides)


@pytest.mark.parametrize("reduce, numpy_reduce", [("mean", np.mean), ("max", np.max)])
def test_group_pool_is_invariant(reduce, numpy_reduce):
    """The mean or maximum over the last axis; a permutation of it changes nothing."""
    x = np.asarray(normal(2, 4, 4, 3, 8))
    y = pdo.group_pool(x, P4M, reduce)
    np.testing.assert_allclose(y, numpy_reduce(x, -1), rtol=1e-5, atol=1e-6)
    for a in np.flatnonzero(P4M.preserves_grid):
        np.testing.assert_allclose(pdo.group_pool(turn(x, P4M, a), P4M, reduce)[..., None],
                                   turn(np.repeat(y[..., None], 8, -1), P4M, a)[..., :1], atol=1e-6)
    with pytest.raises(ValueError, match="\"mean\" or \"max\", got 'sum'"):
        pdo.group_pool(x, P4M, "sum")


@pytest.mark.parametrize("pool", PERIODIC.values(), ids=PERIODIC)
@pytest.mark.parametrize("group, space", [(LINE, (6,)), (P4M, (6, 4)), (O_H, (4, 4, 4))], ids=lambda v: str(v))
def test_periodic_sampling_keeps_shifts_too(pool, group, space):
    """pool(A·F) = A·pool(F) for every A that preserves the grid; a shift by two points shifts the result."""
    x, pool = np.asarray(normal(2, *space, 1, group.order)), jit(pool)
    y = pool(x)
    for a in np.flatnonzero(group.preserves_grid):
        np.testing.assert_allclose(pool(turn(x, group, a)), turn(y, group, a), atol=1e-5)
    shifted = pool(np.roll(x, 2, axis=1))
    np.testing.assert_allclose(shifted, np.roll(y, 2 * y.shape[1] // space[0], axis=1), atol=1e-5)
    np.testing.assert_allclose(pool(np.full_like(x, 1.7)), 1.7, rtol=3e-6)


def test_periodic_windows_go_around_the_edges():
    """Windows of 3 at stride 2 grow to 4: points 2k - 1 to 2k + 2."""
    x = np.asarray(normal(1, 6, 1, 2))
    y = pdo.mean_pool(x, of(x), 3, 2, periodic=True)
    np.testing.assert_allclose(y, sum(np.roll(x, 1 - k, 1)[:, ::2] for k in range(4)) / 4, atol=1e-6)
    for function in (pdo.max_pool, pdo.blur_pool):
        with pytest.raises(ValueError, match=r"periodic pooling by 2 needs sizes that it divides, .*\(5,\) points"):
            function(x[:, :5], of(x), periodic=True)


@pytest.mark.parametrize("space, sizes, factor", [((5,), (9,), 2), ((4, 3), (8, 7), 2), ((3, 2), (10, 5), 3), ((1,), (3,), 2)])
@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_upsampling_equals_interpolation_at_centred_points(space, sizes, factor, method):
    """Axis by axis numpy's interpolation, or the nearest points, at (n - 1) / 2 + (j - (s - 1) / 2) / factor."""
    x = np.asarray(normal(2, *space, 1, 3), np.float64)
    expected = x
    for axis, (n, s) in enumerate(zip(space, sizes, strict=True), 1):
        points = (n - 1) / 2 + (np.arange(s) - (s - 1) / 2) / factor
        if method == "linear":
            weights = np.array([np.interp(points, np.arange(n), row) for row in np.eye(n)]).T
        else:
            distance = np.abs(points.clip(0, n - 1)[:, None] - np.arange(n))
            weights = (distance < distance.min(1, keepdims=True) + 1e-9).astype(float)
            weights /= weights.sum(1, keepdims=True)
        expected = np.moveaxis(np.tensordot(weights, expected, (1, axis)), 0, axis)
    found = jit(lambda x: pdo.upsample(x, of(x), factor, method, sizes=sizes))(x.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_upsampling_goes_back_from_pools():
    """Every size that a pool leaves can be reached again; means of windows of 2 undo nearest, every second point linear."""

    def run(x):
        back = [pdo.upsample(pool(x, P4), P4, sizes=x.shape[1:3]) for pool in (pdo.mean_pool, pdo.blur_pool)]
        halved = pdo.mean_pool(pdo.upsample(x, P4, 2, "nearest"), P4)
        return back, [halved, pdo.upsample(x, P4, sizes=[2 * n - 1 for n in x.shape[1:3]])[:, ::2, ::2]]

    for n in (6, 7):
        back, same = jit(run)(x := normal(1, n, n, 2))
        assert [y.shape for y in back] == [x.shape] * 2
        for y in same:
            np.testing.assert_allclose(y, x, atol=1e-6)
    for sizes, periodic in (([12], False), ([10, 12], False), ([12, 13], True)):
        with pytest.raises(ValueError, match=r"sizes of upsample must be (within 1 of|equal to) \[12, 12\]"):
            pdo.upsample(normal(1, 6, 6, 2), P4, sizes=sizes, periodic=periodic)
    with pytest.raises(ValueError, match='"linear" or "nearest", got \'cubic\''):
        pdo.upsample(normal(1, 6, 6, 2), P4, method="cubic")


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_norm_max_pool_takes_the_longest_vector(dim):
    """Of every window the vector of largest norm, whole; of equally long ones the mean; turned vectors give turned results."""
    group = {1: LINE, 2: P4M, 3: O_H}[dim]
    rep = fields.standard(group)
    x = np.asarray(normal(2, *[4] * dim, 3, dim))
    y = pdo.norm_max_pool(x, rep)
    for where in itertools.product(range(2), repeat=dim):
        box = x[(slice(None), *(slice(2 * w, 2 * w + 2) for w in where))].reshape(2, 2**dim, 3, dim)
        best = (box**2).sum(-1, keepdims=True).argmax(1, keepdims=True)
        np.testing.assert_allclose(y[(slice(None), *where)], np.take_along_axis(box, best, 1)[:, 0], atol=1e-6)
    for a in range(0, group.order, 5):
        np.testing.assert_allclose(pdo.norm_max_pool(fields.act(x, rep, a), rep), fields.act(y, rep, a), atol=1e-5)
    np.testing.assert_allclose(pdo.norm_max_pool(np.ones_like(x), rep), 1)


@pytest.mark.parametrize("space, sizes", [((7,), 3), ((5, 8), (2, 5)), ((4, 3, 5), 1)], ids=str)
def test_adaptive_pools_equal_a_plain_loop(space, sizes):
    """Windows from floor(k n / s) to ceil((k + 1) n / s); the whole of space for 1."""
    x, each = np.asarray(normal(2, *space, 2, 3)), np.broadcast_to(sizes, len(space))
    for name, reduce in (("mean", np.mean), ("max", np.max)):
        y = pdo.adaptive_pool(x, of(x), sizes, name)
        assert y.shape == (2, *each, 2, 3)
        for where in itertools.product(*map(range, each)):
            box = tuple(slice(int(np.floor(w * n / s)), int(np.ceil((w + 1) * n / s)))
                        for w, n, s in zip(where, space, each, strict=True))
            expected = reduce(x[(slice(None), *box)], axis=tuple(range(1, 1 + len(space))))
            np.testing.assert_allclose(y[(slice(None), *where)], expected, atol=1e-5)
    for bad in (0, 9, 2.0, (1,) * (len(space) + 1)):
        with pytest.raises(ValueError, match="sizes of adaptive_pool must be (at most|an int >= 1)"):
            pdo.adaptive_pool(x, of(x), bad)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_pooling_over_a_subgroup(reduce):
    """A field of the quotient remains; over the reflection of p4m it is a regular field of p4, under the elements of p4."""
    for group, subgroup in ((P4M, [0, 4]), (P4M, P4), (O_H, pdo.groups.octahedral()), (P4, [0, 2])):
        space, rep = (3,) * group.dim, fields.quotient(group, subgroup)
        x = np.asarray(normal(1, *space, 2, group.order))
        y = pdo.group_pool(x, group, reduce, subgroup=subgroup)
        for a in range(group.order):
            np.testing.assert_allclose(pdo.group_pool(turn(x, group, a), group, reduce, subgroup=subgroup),
                                       fields.act(y, rep, a), atol=1e-6)
    restricted = fields.restrict(fields.quotient(P4M, [0, 4]), P4)
    np.testing.assert_array_equal(restricted.matrices, fields.regular(P4).matrices)
    with pytest.raises(ValueError, match="quotient needs a subgroup"):
        pdo.group_pool(np.ones((1, 3, 3, 2, 8)), P4M, reduce, subgroup=[0, 1])
    with pytest.raises(ValueError, match="takes regular fields of a Group"):
        pdo.group_pool(np.ones((1, 3, 3, 2, 8)), fields.regular(P4M), reduce, subgroup=[0, 4])


def test_spherical_mask():
    """The inscribed disc or ball; every element that keeps the grid keeps it."""
    assert pdo.spherical_mask((5,)).all() and pdo.spherical_mask((1, 1)).all()
    for group, space in ((P4M, (7, 7)), (O_H, (4, 4, 4)), (P4M, (4, 6))):
        mask = pdo.spherical_mask(space, 0.8)[None, ..., None, None] * np.ones(group.order)
        for a in np.flatnonzero(group.preserves_grid):
            if turn(mask, group, a).shape == mask.shape:
                np.testing.assert_array_equal(turn(mask, group, a), mask)
    assert 0.7 < pdo.spherical_mask((100, 100)).mean() / (np.pi / 4) < 1.05


def test_any_number_of_axes_before_space():
    """Fields [time, batch, *space, channels, d] give what one batch of all gives: convolutions, norms, pools, the rest."""
    x, vector, regular = normal(2, 3, 4, 4, 2, 4), fields.standard(P4), fields.regular(P4)
    layers = [pdo.GroupConv(2, P4, use_bias=True), pdo.PDOConv(2, regular, vector, transpose=True, strides=2),
              pdo.GroupBatchNorm(P4, use_running_average=True), pdo.nonlinearities.FieldNorm(P4),
              pdo.nonlinearities.NormNonlinearity(regular),
              pdo.nonlinearities.FieldBatchNorm(regular, use_running_average=True)]
    functions = [pdo.max_pool, pdo.mean_pool, pdo.blur_pool, pdo.upsample, pdo.group_pool,
                 lambda x, _: pdo.norm_max_pool(x[..., :2], vector)]

    def run(x):
        return [layer.init_with_output(jax.random.key(0), x)[0] for layer in layers] + [f(x, P4) for f in functions]

    found, expected = jit(run)(x), jit(run)(x.reshape(6, *x.shape[2:]))
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e.reshape(2, 3, *e.shape[1:]), atol=1e-5)


def test_pools_of_masked_fields():
    """As docs/escnn.md says: the mean of what a mask keeps is a ratio of two pools, the maximum one with -inf elsewhere."""
    x, mask = normal(2, 6, 6, 2, 4), np.random.default_rng(0).random((2, 6, 6, 1, 1)) < 0.7
    mask[:, ::2, ::2] = True  # no window is empty
    box = lambda a: np.asarray(a).reshape(2, 3, 2, 3, 2, *a.shape[3:])
    kept = np.ma.array(box(x), mask=~np.broadcast_to(box(mask), box(x).shape))
    mean = pdo.mean_pool(x * mask, P4) / pdo.mean_pool(mask, fields.trivial(P4))
    np.testing.assert_allclose(mean, kept.mean((2, 4)), atol=1e-5)
    np.testing.assert_allclose(pdo.max_pool(jnp.where(mask, x, -jnp.inf), P4), kept.max((2, 4)))
