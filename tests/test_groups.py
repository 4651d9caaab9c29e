"""Groups: closure, tables, errors, and the action on arrays."""

import itertools
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdo_jax import groups


def rotation(t):
    return np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])


def signed_permutations(n):
    return [np.eye(n)[[*range(1, n), 0]], np.eye(n)[[1, 0, *range(2, n)]], np.diag([-1.0] + [1.0] * (n - 1))]


def disguised(group, seed=0):
    """The same group in another orthonormal basis, none of whose elements preserves the grid but 1 (and -1)."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(group.dim, group.dim)))[0]
    return groups.from_generators([turn @ a @ turn.T for a in group.elements], name=f"turned {group.name}")


ORDERS = {
    "p1": (groups.cyclic(1), 1), "p4": (groups.cyclic(4), 4), "p7": (groups.cyclic(7), 7), "p8": (groups.cyclic(8), 8),
    "p1m": (groups.dihedral(1), 2), "p4m": (groups.dihedral(4), 8), "p6m": (groups.dihedral(6), 12),
    "line": (groups.reflection(1), 2), "mirror": (groups.reflection(3), 2),
    "T": (groups.tetrahedral(), 12), "O": (groups.octahedral(), 24), "I": (groups.icosahedral(), 60),
    "T_d": (groups.tetrahedral(True), 24), "O_h": (groups.octahedral(True), 48), "I_h": (groups.icosahedral(True), 120),
    "4-D": (groups.from_generators(signed_permutations(4)), 384),
    "5-D": (groups.from_generators([np.eye(5)[[1, 2, 3, 4, 0]], -np.eye(5)]), 10),
    "turned O": (disguised(groups.octahedral()), 24),
}
ALL = pytest.mark.parametrize("group, order", ORDERS.values(), ids=ORDERS)


@ALL
def test_group_axioms(group, order):
    """Order, orthogonality, distinct elements, closure through the table, associativity of it, inverses, identity first."""
    assert (group.order, group.dim) == (order, group.elements.shape[1])
    e, n = group.elements, group.order
    np.testing.assert_allclose(e @ np.swapaxes(e, 1, 2), np.broadcast_to(np.eye(group.dim), e.shape), atol=1e-14)
    np.testing.assert_array_equal(e[0], np.eye(group.dim))
    np.testing.assert_allclose(e[:, None] @ e[None], e[group.table], atol=1e-14)
    assert all(sorted(row) == list(range(n)) for row in group.table.tolist())
    np.testing.assert_array_equal(group.table[group.table[:, 1 % n], 2 % n], group.table[:, group.table[1 % n, 2 % n]])
    np.testing.assert_array_equal(group.table[np.arange(n), group.inverse], 0)
    np.testing.assert_array_equal(group.table[group.inverse, np.arange(n)], 0)
    assert [group.index(a) for a in e] == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 8, 12, 17, 96])
def test_elements_of_the_plane_groups_are_in_the_documented_order(n):
    """cyclic: element k turns by 2πk/n; dihedral: the rotations, then the rotations times x_1 -> -x_1."""
    turns = np.stack([rotation(2 * np.pi * k / n) for k in range(n)])
    np.testing.assert_allclose(groups.cyclic(n).elements, turns, atol=1e-13)
    np.testing.assert_allclose(groups.dihedral(n).elements, np.concatenate([turns, turns @ np.diag([1.0, -1.0])]), atol=1e-13)


@pytest.mark.parametrize("make, half", [(groups.tetrahedral, 12), (groups.octahedral, 24), (groups.icosahedral, 60)])
def test_solids_without_reflections_are_the_rotations_of_those_with(make, half):
    """det = 1 for all of the small group and for half of the full one, which contains the small one."""
    small, full = make(), make(True)
    np.testing.assert_allclose(np.linalg.det(small.elements), 1)
    assert (np.linalg.det(full.elements) > 0).sum() == half
    for a in small.elements:
        full.index(a)


def test_octahedral_with_reflections_is_all_signed_permutations():
    """48 distinct signed permutations of three axes, all of which preserve the grid."""
    assert groups.octahedral(True).preserves_grid.all()


@pytest.mark.parametrize("group, count", [
    (groups.cyclic(8), 4), (groups.cyclic(6), 2), (groups.cyclic(7), 1), (groups.dihedral(8), 8), (groups.dihedral(6), 4),
    (groups.tetrahedral(), 12), (groups.tetrahedral(True), 24), (groups.icosahedral(), 12), (groups.icosahedral(True), 24),
    (ORDERS["turned O"][0], 1)])
def test_grid_preserving_elements(group, count):
    """The number of signed permutations in each group."""
    assert group.preserves_grid.sum() == count


@pytest.mark.parametrize("group, found", [
    (groups.cyclic(8), True), (groups.cyclic(3), False), (groups.octahedral(), False), (groups.octahedral(True), True),
    (groups.tetrahedral(True), False), (groups.reflection(1), True), (groups.reflection(2), False)])
def test_point_reflection(group, found):
    """-1 is found exactly in the groups that hold it."""
    k = group.point_reflection
    assert (k is not None) == found
    if found:
        np.testing.assert_array_equal(group.elements[k], -np.eye(group.dim))


@pytest.mark.parametrize("n", [3, 8, 12, 60, 100])
def test_float32_generators_are_polished(n):
    """Generators in float32 give the table of the exact group, satisfied to float64 rounding."""
    group = groups.from_generators([rotation(2 * np.pi / n).astype(np.float32), np.diag([1, -1]).astype(np.float32)])
    assert group.order == 2 * n
    np.testing.assert_array_equal(group.table, groups.dihedral(n).table)
    np.testing.assert_allclose(group.elements[:, None] @ group.elements[None], group.elements[group.table], atol=1e-13)


@settings(max_examples=20, deadline=None, database=None)
@given(st.lists(st.permutations(range(4)), min_size=1, max_size=3), st.integers(0, 15), st.integers(0, 2 ** 32 - 1))
def test_any_generators_close(permutations, signs, seed):
    """Property: the closure of random signed permutations in a random basis is a group that holds its generators."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    flip = np.diag([1.0 - 2 * (signs >> k & 1) for k in range(4)])
    generators = [turn @ np.eye(4)[list(p)] @ flip @ turn.T for p in permutations]
    group = groups.from_generators(generators)
    assert 384 % group.order == 0
    for g in generators:
        group.index(g)
    a, b = np.random.default_rng(seed).integers(group.order, size=(2, 50))
    np.testing.assert_allclose(group.elements[a] @ group.elements[b], group.elements[group.table[a, b]], atol=1e-13)


def test_equality_and_hash():
    """Groups are equal when their elements are, in order: they serve as keys of caches."""
    assert groups.cyclic(4) == groups.from_generators([rotation(np.pi / 2)])
    assert hash(groups.cyclic(4)) == hash(groups.from_generators([rotation(np.pi / 2)]))
    assert groups.cyclic(8) != groups.dihedral(4) and groups.cyclic(2) != groups.reflection(2)


def test_elements_are_read_only():
    """A group cannot be changed behind the caches."""
    with pytest.raises(ValueError):
        groups.cyclic(4).elements[0] = 0


@pytest.mark.parametrize("generators, message", [
    ([], "at least one matrix"),
    ([np.full((2, 2), np.nan)], "not finite"),
    ([np.full((2, 2), np.inf)], "not finite"),
    ([np.ones((2, 2))], "orthogonal"),
    ([np.eye(2) * 1e200], "orthogonal"),
    ([np.eye(2) * 1.001], "A A\\^T"),
    ([np.ones((2, 3))], r"shape \(2, 3\)"),
    ([np.eye(2), np.eye(3)], r"expected an orthogonal 2×2 matrix, got shape \(3, 3\)"),
    ([np.zeros((0, 0))], "shape"),
    ([3.0], "shape"),
    (np.eye(2), "shape"),
    ([np.eye(2) * 1j], "real square matrix"),
    ([[[1, 0], [0]]], "real square matrix"),
    ([[["a", "b"], ["c", "d"]]], "real square matrix"),
    ([None], "orthogonal"),
])
def test_bad_generators(generators, message):
    """Whatever is not a list of orthogonal matrices of one size: a ValueError that says what was expected."""
    with pytest.raises(ValueError, match=message):
        groups.from_generators(generators)


@pytest.mark.parametrize("generators", [
    [rotation(1.0)], [rotation(1.0), np.diag([1.0, -1.0])], [rotation(1e-3)], [np.eye(3)[[1, 2, 0]], np.diag([1.0, -1, -1]) @
     np.block([[rotation(1.0), np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])]])
def test_infinite_groups_are_refused_promptly(generators):
    """Generators whose products never close: an error within 2 seconds of computing."""
    start = time.process_time()
    with pytest.raises(ValueError, match="infinite"):
        groups.from_generators(generators)
    assert time.process_time() - start < 2


def test_max_order():
    """The limit is the largest order that is accepted."""
    generators = [np.eye(3)[[2, 0, 1]], -np.eye(3)]
    assert groups.from_generators(generators, max_order=6).order == 6
    with pytest.raises(ValueError, match="max_order=5"):
        groups.from_generators(generators, max_order=5)


@pytest.mark.parametrize("make", [groups.cyclic, groups.dihedral, groups.reflection])
@pytest.mark.parametrize("n", [0, -1, 2.0, True, "4", None, 700_000])
def test_bad_counts(make, n):
    """Only whole numbers within the limit make a group: 700 000 turns would differ by less than the tolerance."""
    with pytest.raises(ValueError, match="whole number"):
        make(n)


def test_index_of_a_stranger():
    """An orthogonal matrix that is not an element is named in the error."""
    with pytest.raises(ValueError, match="p4.*no element"):
        groups.cyclic(4).index(rotation(0.3))


GRID = [(g, k) for g in (groups.cyclic(8), groups.dihedral(8), groups.reflection(1), groups.reflection(2),
                         groups.octahedral(True), groups.icosahedral(True)) for k in np.flatnonzero(g.preserves_grid)]


@pytest.mark.parametrize("group, k", GRID, ids=lambda v: v.name if isinstance(v, groups.Group) else str(v))
def test_grid_preserving_elements_move_points_by_their_matrix(group, k):
    """(π_A f)(A x) = f(x) for every point x of the grid, counted from the centre: exact, and the shape turns along."""
    shape = (3, 5, 4)[:group.dim]
    f = np.random.default_rng(0).normal(size=(2, *shape, 1))
    matrix = group.elements[k]
    y = groups.transform(f, matrix)
    turned = np.abs(matrix).round().astype(int) @ shape
    assert y.shape == (2, *turned, 1)
    expected = np.zeros(y.shape)
    for point in itertools.product(*map(range, shape)):
        target = matrix @ (np.array(point) - (np.array(shape) - 1) / 2) + (turned - 1) / 2
        expected[(slice(None), *np.round(target).astype(int))] = f[(slice(None), *point)]
    np.testing.assert_array_equal(y, expected.astype(y.dtype))


@pytest.mark.parametrize("n", [4, 8, 12])
def test_quarter_turns_of_the_plane_are_rot90(n):
    """In cyclic and dihedral groups the element at 90°·k is numpy.rot90(f, k); the reflection flips axis 1 before it."""
    f = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
    for k in range(4):
        for group in (groups.cyclic(n), groups.dihedral(n)):
            turned = groups.transform(f, group.elements[k * n // 4])
            np.testing.assert_array_equal(turned, np.rot90(f, k, axes=(1, 2)))
        flipped = groups.transform(f, group.elements[n + k * n // 4])
        np.testing.assert_array_equal(flipped, np.rot90(np.flip(f, 2), k, axes=(1, 2)))


@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (2, 0)])
def test_quarter_turns_of_space_are_rot90(axes):
    """In three dimensions the quarter turn of axis a towards axis b is numpy.rot90(f, axes=(a, b))."""
    f = np.random.default_rng(0).normal(size=(2, 4, 4, 4, 3)).astype(np.float32)
    matrix = np.eye(3)
    matrix[np.ix_(axes, axes)] = rotation(np.pi / 2).round()
    groups.octahedral().index(matrix)
    np.testing.assert_array_equal(groups.transform(f, matrix), np.rot90(f, axes=(axes[0] + 1, axes[1] + 1)))


@pytest.mark.parametrize("group", [groups.dihedral(4), groups.octahedral(True)])
def test_action_composes(group):
    """act(act(F, B), A) = act(F, AB), exactly, for all pairs that preserve the grid (a sample of them in space)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *(3, 4, 5)[:group.dim], 2, group.order)), jnp.float32)
    pairs = list(itertools.product(range(group.order), repeat=2))
    for a, b in pairs if group.order < 10 else np.random.default_rng(0).permutation(pairs)[:10]:
        np.testing.assert_array_equal(groups.act(groups.act(x, group, b), group, a), groups.act(x, group, group.table[a, b]))


def test_action_permutes_the_group_axis():
    """[R·F](x, RA) = [turned F](x, A): the value at A moves to RA."""
    group = groups.dihedral(3)
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 1, 6)).astype(np.float32)
    for r in np.flatnonzero(group.preserves_grid):
        for a in range(6):
            assert groups.act(x, group, r)[..., group.table[r, a]] == x[..., a]


def bump(points):
    """A smooth function of [..., n] that is nearly 0 on the border of [-1, 1]^n."""
    return np.exp(-20 * ((points - 0.1) ** 2).sum(-1)) * (1 + np.sin(4 * points[..., 0]))


def grid(size, dim):
    return np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * dim, indexing="ij"), -1)


@pytest.mark.parametrize("dim, sizes", [(2, (33, 65)), (3, (21, 41))])
def test_interpolation_is_of_third_order(dim, sizes):
    """Halving the grid spacing divides the error of a turn by an angle off the grid by about 8."""
    matrix = np.eye(dim)
    matrix[:2, :2] = rotation(0.4)
    errors = []
    for size in sizes:
        points = grid(size, dim)
        y = groups.transform(jnp.asarray(bump(points))[None, ..., None], matrix)[0, ..., 0]
        errors.append(np.abs(y - bump(points @ matrix)).max())
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (slopes > 2.6).all(), (errors, slopes)


def test_interpolation_is_exact_on_linear_functions():
    """Inside the array a linear function is turned exactly, towards the right side."""
    points = grid(15, 2)
    f = points @ np.array([1.0, 0.5]) + 2
    y = groups.transform(jnp.asarray(f)[None, ..., None], rotation(0.4))[0, ..., 0]
    expected = (points @ rotation(0.4)) @ np.array([1.0, 0.5]) + 2
    np.testing.assert_allclose(y[4:11, 4:11], expected[4:11, 4:11], rtol=1e-5)


def test_transform_keeps_dtypes():
    """Floats keep their type; whole numbers, which cannot hold interpolated values, become float32."""
    assert groups.transform(jnp.ones((1, 4, 4, 1), jnp.bfloat16), rotation(0.3)).dtype == jnp.bfloat16
    y = groups.transform(jnp.full((1, 9, 9, 1), 200, jnp.uint8), rotation(0.3))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y[0, 4, 4, 0], 200, rtol=1e-6)


def test_bad_input_of_the_action():
    """Too few axes, a matrix that is not orthogonal, a group axis of another size: named."""
    with pytest.raises(ValueError, match="2 spatial axes"):
        groups.transform(jnp.ones((3, 4)), np.eye(2))
    with pytest.raises(ValueError, match="orthogonal"):
        groups.transform(jnp.ones((1, 3, 3, 1)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="p4.*size 4"):
        groups.act(jnp.ones((1, 3, 3, 1, 8)), groups.cyclic(4), 1)
