"""Representations: homomorphisms, decompositions, restriction, bad input."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from pdo_jax import fields, groups

QUATERNIONS = groups.from_generators([  # ±1, ±i, ±j, ±k by left multiplication on R^4
    [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]], [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]]],
    name="Q8")
HYPEROCTAHEDRAL = groups.from_generators([np.eye(4)[[1, 2, 3, 0]], np.eye(4)[[1, 0, 2, 3]], np.diag([-1, 1, 1, 1])], name="B4")
DIMENSIONS = {  # of the real irreducible representations, from the character tables
    groups.cyclic(1): [1], groups.cyclic(2): [1, 1], groups.cyclic(3): [1, 2], groups.cyclic(4): [1, 1, 2],
    groups.cyclic(6): [1, 1, 2, 2], groups.cyclic(8): [1, 1, 2, 2, 2], groups.cyclic(7): [1, 2, 2, 2],
    groups.dihedral(1): [1, 1], groups.dihedral(3): [1, 1, 2], groups.dihedral(4): [1, 1, 1, 1, 2],
    groups.dihedral(6): [1, 1, 1, 1, 2, 2], groups.reflection(1): [1, 1], groups.reflection(3): [1, 1],
    groups.tetrahedral(): [1, 2, 3], groups.octahedral(): [1, 1, 2, 3, 3], groups.icosahedral(): [1, 3, 3, 4, 5],
    groups.tetrahedral(True): [1, 1, 2, 3, 3], groups.octahedral(True): [1] * 4 + [2] * 2 + [3] * 4,
    groups.icosahedral(True): [1, 1, 3, 3, 3, 3, 4, 4, 5, 5], QUATERNIONS: [1, 1, 1, 1, 4],
    HYPEROCTAHEDRAL: [1] * 4 + [2] * 2 + [3] * 4 + [4] * 4 + [6] * 4 + [8] * 2,
}
GROUPS = pytest.mark.parametrize("group", list(DIMENSIONS), ids=lambda g: g.name)
SMALL = pytest.mark.parametrize("group", [g for g in DIMENSIONS if g.order <= 24], ids=lambda g: g.name)


def named(group):
    return [fields.trivial(group), fields.determinant(group), fields.standard(group), fields.regular(group),
            fields.direct_sum([fields.standard(group), fields.trivial(group), fields.regular(group)]), *fields.irreps(group)]


@SMALL
def test_all_are_orthogonal_homomorphisms(group):
    """ρ(A) ρ(B) = ρ(AB) for all pairs, ρ(1) = 1, ρ(A) ρ(A)ᵀ = 1."""
    for rep in named(group):
        m = rep.matrices
        np.testing.assert_allclose(m[:, None] @ m[None], m[group.table], atol=1e-12)
        np.testing.assert_allclose(m[0], np.eye(rep.dim), atol=1e-12)
        assert rep.is_orthogonal


@pytest.mark.parametrize("group", [groups.cyclic(4), groups.dihedral(4), groups.octahedral(True)], ids=lambda g: g.name)
def test_regular_is_the_action_on_features(group):
    """act(x, R) turns the array and multiplies the last axis by ρ(R)."""
    rep = fields.regular(group)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *(3, 4, 5)[:group.dim], 2, group.order)), jnp.float32)
    for r in range(0, group.order, max(1, group.order // 8)):
        expected = np.asarray(groups.transform(x, group.elements[r])) @ rep.matrices[r].T
        np.testing.assert_allclose(groups.act(x, group, r), expected, atol=1e-6)


@pytest.mark.parametrize("group, subgroup, dim", [
    (groups.octahedral(), groups.tetrahedral(), 2), (groups.dihedral(4), groups.cyclic(4), 2), (groups.dihedral(6), [0, 6], 6),
    (groups.icosahedral(), groups.tetrahedral(), 5), (groups.cyclic(8), [0, 4], 4), (groups.cyclic(8), range(8), 1),
    (groups.octahedral(True), groups.octahedral(True), 1)])
def test_quotients(group, subgroup, dim):
    """order / |H| cosets, moved about by the group as AH -> RAH; the subgroup itself is the first and is kept by H only."""
    rep = fields.quotient(group, subgroup)
    assert rep.dim == dim and rep.is_permutation and len(rep.blocks) == 1
    members = range(group.order) if not isinstance(subgroup, groups.Group) else [group.index(a) for a in subgroup.elements]
    members = members if isinstance(subgroup, groups.Group) else list(subgroup)
    np.testing.assert_array_equal(np.flatnonzero(rep.matrices[:, 0, 0] == 1), sorted(members))
    np.testing.assert_array_equal(rep.matrices.sum(1), 1)


def test_quotient_by_one_is_regular_and_by_all_is_trivial():
    """The two ends of the scale of quotients."""
    group = groups.dihedral(5)
    assert fields.quotient(group, groups.cyclic(1)) == fields.regular(group)
    assert fields.quotient(group, group) == fields.trivial(group)


@GROUPS
def test_irreps_are_complete(group):
    """Dimensions from the character tables; characters orthogonal; each irreducible; Σ d² / (commutant dimension) = order."""
    irreps = fields.irreps(group)
    assert [r.dim for r in irreps] == DIMENSIONS[group]
    assert irreps[0] == fields.trivial(group)
    characters = np.stack([np.trace(r.matrices, axis1=1, axis2=2) for r in irreps])
    gram = characters @ characters.T / group.order
    commutants = gram.diagonal()
    np.testing.assert_allclose(gram, np.diag(commutants), atol=1e-9)
    assert set(commutants.round(9)) <= {1, 2, 4}
    np.testing.assert_allclose(sum(r.dim ** 2 / c for r, c in zip(irreps, commutants, strict=True)), group.order)
    for rep, commutant in zip(irreps, commutants, strict=True):
        assert rep.is_orthogonal and len(rep.blocks) == 1
        assert matrices_that_commute(rep) == round(commutant)


def matrices_that_commute(rep):
    """The dimension of {X: X ρ(A) = ρ(A) X for all A}, by the rank of the linear system."""
    eye = np.eye(rep.dim)
    square = np.zeros((rep.dim ** 2,) * 2)
    for m in rep.matrices[:40]:  # they generate the group
        system = np.kron(m, eye) - np.kron(eye, m.T)
        square += system.T @ system
    return rep.dim ** 2 - np.linalg.matrix_rank(square, tol=1e-8)


@GROUPS
def test_regular_holds_each_irrep_dim_over_commutant_times(group):
    """<χ_regular, χ> = χ(1) = dim, in units of the commutant dimension."""
    regular = np.trace(fields.regular(group).matrices, axis1=1, axis2=2) if group.order < 200 else np.r_[
        group.order, np.zeros(group.order - 1)]
    for rep in fields.irreps(group):
        np.testing.assert_allclose(regular @ np.trace(rep.matrices, axis1=1, axis2=2) / group.order, rep.dim, atol=1e-9)


def test_irreps_of_rotations_are_turns_in_natural_bases():
    """For cyclic(n) the two-dimensional ones are rotations by k times the angle, by rising frequency."""
    group = groups.cyclic(12)
    for k, rep in enumerate((r for r in fields.irreps(group) if r.dim == 2), 1):
        c, s = np.cos(2 * np.pi * k / 12), np.sin(2 * np.pi * k / 12)
        np.testing.assert_allclose(rep.matrices[1], [[c, -s], [s, c]], atol=1e-12)


def test_irreps_are_the_same_again():
    """Computed twice, the matrices are equal to rounding, signs and order included: parameters keep their meaning."""
    first = [r.matrices for r in fields.irreps(groups.octahedral(True))]
    fields.irreps.cache_clear()
    for a, b in zip(first, fields.irreps(groups.octahedral(True)), strict=True):
        np.testing.assert_allclose(a, b.matrices, atol=1e-13)


def test_irreps_of_the_largest_solid_are_fast():
    """Order 120 within 5 seconds, and from the cache at once."""
    fields.irreps.cache_clear()
    start = time.perf_counter()
    fields.irreps(groups.icosahedral(True))
    assert time.perf_counter() - start < 5
    assert fields.irreps(groups.icosahedral(True)) is fields.irreps(groups.icosahedral(True))


def test_direct_sum_blocks():
    """A direct sum is block diagonal, and its blocks are its parts again."""
    group = groups.octahedral()
    parts = [fields.standard(group), fields.trivial(group), fields.regular(group), fields.irreps(group)[2]]
    rep = fields.direct_sum(parts)
    assert [len(b) for b in rep.blocks] == [3, 1, 24, 2]
    for block, part in zip(rep.blocks, parts, strict=True):
        np.testing.assert_array_equal(rep.matrices[:, block][:, :, block], part.matrices)


def test_permutation_like():
    """True for trivial, regular, quotient and their sums, false where signs or mixtures occur."""
    group = groups.dihedral(6)
    assert fields.trivial(group).is_permutation and fields.regular(group).is_permutation
    assert fields.direct_sum([fields.quotient(group, [0, 6]), fields.trivial(group)]).is_permutation
    assert not fields.standard(group).is_permutation and not fields.determinant(group).is_permutation
    assert fields.determinant(groups.cyclic(6)) == fields.trivial(groups.cyclic(6))


def test_equal_representations_hash_alike():
    """Representations are keys of caches: equal by group and matrices, whatever their names."""
    group = groups.cyclic(4)
    a, b = fields.standard(group), fields.Representation("rotation", groups.cyclic(4), fields.irreps(group)[2].matrices)
    assert a == b and hash(a) == hash(b)
    assert a != fields.trivial(group) and fields.trivial(group) != fields.trivial(groups.cyclic(8))


@pytest.mark.parametrize("group, subgroup", [
    (groups.dihedral(8), groups.cyclic(4)), (groups.octahedral(True), groups.tetrahedral()),
    (groups.cyclic(8), groups.cyclic(1)), (groups.icosahedral(), groups.tetrahedral())])
def test_restriction(group, subgroup):
    """ρ restricted has ρ's matrices on the common elements."""
    for rep in [fields.standard(group), *fields.irreps(group)]:
        small = fields.restrict(rep, subgroup)
        assert small.group == subgroup
        for k, a in enumerate(subgroup.elements):
            np.testing.assert_array_equal(small.matrices[k], rep.matrices[group.index(a)])


@pytest.mark.parametrize("group, subgroup", [
    (groups.dihedral(4), groups.cyclic(4)), (groups.dihedral(8), groups.dihedral(4)), (groups.cyclic(8), groups.cyclic(2)),
    (groups.octahedral(), groups.tetrahedral()), (groups.dihedral(4), groups.from_generators([np.diag([-1, 1])]))])
def test_restricting_a_regular_field_commutes_with_the_subgroup(group, subgroup):
    """Acting by an element of H and splitting into fields of H is the same in either order; no value is lost."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *(4, 4, 4)[:group.dim], 3, group.order)), jnp.float32)
    y = fields.restrict_regular(x, group, subgroup)
    assert y.shape == (*x.shape[:-2], 3 * group.order // subgroup.order, subgroup.order)
    np.testing.assert_array_equal(np.sort(x.ravel()), np.sort(y.ravel()))
    for h, matrix in enumerate(subgroup.elements):
        turned = fields.restrict_regular(groups.act(x, group, group.index(matrix)), group, subgroup)
        np.testing.assert_array_equal(turned, groups.act(y, subgroup, h))


@pytest.mark.parametrize("group", [groups.cyclic(11), groups.dihedral(11)], ids=lambda g: g.name)
def test_band_limited_fields(group):
    """One of each irreducible representation up to the frequency: 2 L + 1 values for SO(2), 2 L + 2 for O(2)."""
    rep = fields.band_limited(group, 3)
    reflections = group.order > 11
    assert [len(b) for b in rep.blocks] == [1] * (1 + reflections) + [2, 2, 2]
    np.testing.assert_allclose(rep.matrices[:, -6:-4, -6:-4], group.elements, atol=1e-14)
    np.testing.assert_allclose(rep.matrices[3, -2:, -2:], np.linalg.matrix_power(rep.matrices[1, -2:, -2:], 3), atol=1e-14)


def test_band_limit_needs_a_large_group():
    """One without invariants up to degree 2·frequency + order; the error names the first one. The plane and space only."""
    fields.band_limited(groups.cyclic(9), 2)
    for small, frequency, order, degree in [
            (groups.dihedral(8), 2, 4, 8), (groups.octahedral(), 0, 4, 4), (groups.tetrahedral(True), 1, 1, 3),
            (groups.icosahedral(), 2, 2, 6), (groups.icosahedral(True), 1, 4, 6), (groups.reflection(3), 0, 1, 1)]:
        with pytest.raises(ValueError, match=f"degrees 1 to {2 * frequency + order}, .* has one of degree {degree}: .*larger"):
            fields.band_limited(small, frequency, order)
    with pytest.raises(ValueError, match="of the plane or of space"):
        fields.band_limited(groups.reflection(1), 0)
    with pytest.raises(ValueError, match="frequency=-1"):
        fields.band_limited(groups.cyclic(9), -1)


@pytest.mark.parametrize("group", [*(g for g in DIMENSIONS if g.order <= 24), groups.icosahedral()], ids=lambda g: g.name)
def test_decomposition(group):
    """Q^{-1} ρ Q is block diagonal in irreducible representations, of the multiplicities that characters give, for regular,
    quotient, induced and skewed representations; Q is orthogonal where ρ is."""
    member = [0, int(np.flatnonzero(group.table.diagonal() == 0)[-1])]  # an element of order 2, or the identity
    skew = np.eye(group.dim) + np.eye(group.dim, k=1)
    reps = [fields.regular(group), fields.quotient(group, member), fields.direct_sum([fields.standard(group)] * 2),
            fields.tensor_product(fields.standard(group), fields.determinant(group)),
            fields.Representation("skewed", group, skew @ group.elements @ np.linalg.inv(skew))]
    for rep in reps:
        parts, q = fields.decompose(rep)
        np.testing.assert_allclose(np.linalg.inv(q) @ rep.matrices @ q, fields.direct_sum(parts).matrices, atol=1e-9)
        assert not rep.is_orthogonal or np.allclose(q.T @ q, np.eye(rep.dim), atol=1e-9)
        assert all(any(part is irrep for irrep in fields.irreps(group)) for part in parts)


def test_tensor_product():
    """ρ_1 ⊗ ρ_2 acts on the products of all values of two fields."""
    group = groups.octahedral()
    first, second = fields.standard(group), fields.quotient(group, groups.tetrahedral())
    x, y = np.random.default_rng(0).normal(size=(2, 5, 3))
    y, product = y[:, :2], lambda x, y: (x[..., :, None] * y[..., None, :]).reshape(*x.shape[:-1], -1)
    rep = fields.tensor_product(first, second)
    for a in range(group.order):
        turned = product(fields.act(x, first, a, space=False), fields.act(y, second, a, space=False))
        np.testing.assert_allclose(turned, fields.act(product(x, y), rep, a, space=False), atol=1e-6)
    with pytest.raises(ValueError, match="of one group"):
        fields.tensor_product(first, fields.trivial(groups.cyclic(4)))


def test_harmonics_are_irreducible_representations_of_rotations():
    """In three dimensions 2 k + 1 values, orthogonal, a homomorphism, of character sin((k + 1/2) t) / sin(t / 2); degree 1 is
    the matrix itself; in the plane a rotation by k t."""
    random = np.random.default_rng(0)
    a, b = (np.linalg.qr(random.normal(size=(3, 3)))[0] for _ in range(2))
    for k in range(6):
        one, two, both = fields.harmonics(np.stack([a, b, a @ b]), k)
        assert one.shape == (2 * k + 1,) * 2
        np.testing.assert_allclose(one @ two, both, atol=1e-12)
        np.testing.assert_allclose(one @ one.T, np.eye(2 * k + 1), atol=1e-12)
        proper = np.linalg.det(a) * a
        t = np.arccos((np.trace(proper) - 1) / 2)
        np.testing.assert_allclose(np.trace(fields.harmonics(proper[None], k)[0]), np.sin((k + 0.5) * t) / np.sin(t / 2))
    np.testing.assert_allclose(fields.harmonics(a[None], 1)[0], a, atol=1e-12)
    turn = np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    np.testing.assert_allclose(fields.harmonics(turn[None], 4)[0], np.linalg.matrix_power(turn, 4), atol=1e-12)


SIGN = np.array([1.0, -1, 1, -1]).reshape(4, 1, 1)


@pytest.mark.parametrize("matrices, message", [
    (SIGN[:3], r"\[4, d, d\], got shape \(3, 1, 1\)"),
    (SIGN[:, 0], "shape"),
    (np.ones((4, 2, 3)), "shape"),
    (np.ones((4, 0, 0)), "shape"),
    (SIGN * np.nan, "not finite"),
    (SIGN * np.inf, "not finite"),
    (SIGN * (1 + 0j), "real matrices"),
    ([[["x"]]] * 4, "real matrices"),
    (None, "shape"),
    (-SIGN, "identity"),
    (np.zeros((4, 1, 1)), "identity"),
    (np.array([1.0, 1, -1, -1]).reshape(4, 1, 1), r"no homomorphism: matrices\[\d\] @ matrices\[\d\] differs from m"),
    (np.eye(2)[None].repeat(4, 0) + np.arange(4)[:, None, None] * [[0, 1], [0, 0]], "no homomorphism"),
    (np.array([1.0, -1, 1, -1.001]).reshape(4, 1, 1), "no homomorphism"),
])
def test_bad_representations(matrices, message):
    """Wrong shape, not finite, complex, not a homomorphism: a ValueError that names the representation and the group."""
    with pytest.raises(ValueError, match=message) as error:
        fields.Representation("strange", groups.cyclic(4), matrices)
    assert "strange" in str(error.value) and "p4" in str(error.value)


def test_transposed_regular_is_no_representation():
    """The order of factors is checked: inverse matrices are an anti-homomorphism of a group that does not commute."""
    group = groups.dihedral(3)
    with pytest.raises(ValueError, match="no homomorphism"):
        fields.Representation("wrong side", group, fields.regular(group).matrices.transpose(0, 2, 1))


@pytest.mark.parametrize("make, message", [
    (lambda: fields.direct_sum([]), "at least one"),
    (lambda: fields.direct_sum([fields.trivial(groups.cyclic(4)), fields.trivial(groups.cyclic(8))]), "p4.*p8"),
    (lambda: fields.quotient(groups.cyclic(8), [0, 1]), r"not closed.*\[0, 1\]"),
    (lambda: fields.quotient(groups.cyclic(8), []), "not closed"),
    (lambda: fields.quotient(groups.cyclic(8), [0, 8]), "indices from 0 to 7"),
    (lambda: fields.quotient(groups.cyclic(8), [0.0, 4.0]), "indices from 0 to 7"),
    (lambda: fields.quotient(groups.cyclic(8), groups.cyclic(3)), "p3.*no subgroup of.*p8"),
    (lambda: fields.restrict(fields.regular(groups.cyclic(8)), groups.dihedral(4)), "p4m.*no subgroup of.*p8"),
    (lambda: fields.restrict(fields.regular(groups.octahedral()), groups.cyclic(4)), "dimensions differ"),
    (lambda: fields.restrict_regular(jnp.ones((1, 4, 4, 2, 4)), groups.cyclic(8), groups.cyclic(4)), "channels, 8.*got shape"),
])
def test_bad_combinations(make, message):
    """Mismatched groups and sets that are no subgroups: an error that names both sides."""
    with pytest.raises(ValueError, match=message):
        make()
