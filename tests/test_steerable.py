"""Steerable operators: the constraint, completeness, and the classical operators."""

import math
import resource
import time

import numpy as np
import pytest

from pdo_jax import fields, groups, operators, steerable

P8, P6M, MIRROR = groups.cyclic(8), groups.dihedral(6), groups.reflection(1)
CUBE, T_D = groups.octahedral(), groups.tetrahedral(True)
QUARTERS = fields.quotient(groups.dihedral(4), [0, 4])
SKEW = np.array([[1.0, 0.7], [0.0, 2.0]])  # a basis in which rotations are not orthogonal
CASES = {
    "lifting": (fields.trivial(P8), fields.regular(P8), 4),
    "group convolution": (fields.regular(P6M), fields.regular(P6M), 2),
    "line": (fields.regular(MIRROR), fields.determinant(MIRROR), 3),
    "vectors to features": (fields.standard(CUBE), fields.regular(CUBE), 2),
    "features to vectors": (fields.regular(T_D), fields.standard(T_D), 2),
    "quotients": (QUARTERS, fields.regular(groups.dihedral(4)), 3),
    "quotient to quotient": (QUARTERS, fields.quotient(groups.dihedral(4), [0, 2]), 4),
    "irreps of p8": (fields.irreps(P8)[3], fields.irreps(P8)[2], 3),
    "irreps of I": (fields.irreps(groups.icosahedral())[4], fields.irreps(groups.icosahedral())[3], 2),
    "mixed": (fields.direct_sum([fields.trivial(P6M), fields.standard(P6M)]),
              fields.direct_sum([fields.regular(P6M), fields.determinant(P6M), fields.standard(P6M)]), 2),
    "not orthogonal": (fields.Representation("skew", P8, SKEW @ P8.elements @ np.linalg.inv(SKEW)), fields.regular(P8), 3),
    "nothing": (fields.trivial(P6M), fields.determinant(P6M), 2),
}
ALL = pytest.mark.parametrize("in_rep, out_rep, order", CASES.values(), ids=CASES)


def symbol(basis, dim, order, k):
    """H(ik): what the operators multiply a plane wave e^{ikx} with."""
    powers = [np.prod((1j * k) ** np.array(a)) for a in operators.multi_indices(dim, order)]
    return np.einsum("naij,a->nij", basis, powers)


def inner_products(basis, dim, order, other=None):
    weights = [math.prod(map(math.factorial, a)) / math.factorial(sum(a)) for a in operators.multi_indices(dim, order)]
    return np.einsum("naij,maij,a->nm", basis, basis if other is None else other, weights)


def null_space(in_rep, out_rep, order):
    """The solutions of the constraint from the singular vectors of the stacked linear system: an independent oracle."""
    group, inverse = in_rep.group, in_rep.matrices[in_rep.group.inverse]
    t = operators.action(group.elements, order)
    n = t.shape[1] * out_rep.dim * in_rep.dim
    square = np.zeros((n, n))
    for a in range(1, group.order):
        constraint = np.einsum("kl,ij,cd->lidkjc", t[a], out_rep.matrices[a], inverse[a])
        constraint = constraint.reshape(n, n) - np.eye(n)
        square += constraint.T @ constraint
    values, vectors = np.linalg.eigh(square)
    found = vectors[:, values < 1e-9].T
    return found.reshape(-1, t.shape[1], out_rep.dim, in_rep.dim)


def same_span(a, b):
    """Whether the rows of two arrays span one space."""
    a, b = (m.reshape(len(m), math.prod(m.shape[1:])) for m in (a, b))
    if len(a) != len(b) or not len(a):
        return len(a) == len(b)
    return np.abs(a - (a @ np.linalg.pinv(b)) @ b).max() < 1e-9 and np.linalg.matrix_rank(a) == len(a)


@ALL
def test_plane_waves(in_rep, out_rep, order):
    """H commutes with the group: H(i A k) ρ_in(A) = ρ_out(A) H(i k), for random k and every A; no operators' action is used."""
    group = in_rep.group
    basis = steerable.basis(in_rep, out_rep, order)
    k = np.random.default_rng(0).normal(size=group.dim)
    for a, matrix in enumerate(group.elements):
        left = symbol(basis, group.dim, order, matrix @ k) @ in_rep.matrices[a]
        np.testing.assert_allclose(left, out_rep.matrices[a] @ symbol(basis, group.dim, order, k), atol=1e-11)


@ALL
def test_orthonormal(in_rep, out_rep, order):
    """Orthonormal in the inner product of the docstring, one degree each, by rising degree."""
    basis = steerable.basis(in_rep, out_rep, order)
    np.testing.assert_allclose(inner_products(basis, in_rep.group.dim, order), np.eye(len(basis)), atol=1e-10)
    degrees = np.array([sum(a) for a in operators.multi_indices(in_rep.group.dim, order)])
    used = [set(degrees[np.abs(h).max((1, 2)) > 0]) for h in basis]
    assert all(len(d) == 1 for d in used)
    assert [min(d) for d in used] == sorted(min(d) for d in used)


@pytest.mark.parametrize("name", sorted({*CASES} - {"group convolution", "features to vectors", "vectors to features"}))
def test_complete(name):
    """The basis spans the whole null space of the constraint."""
    assert same_span(steerable.basis(*CASES[name]), null_space(*CASES[name]))


@ALL
def test_number_from_characters(in_rep, out_rep, order):
    """As many operators as the mean of χ_T(A) χ_out(A) χ_in(A^{-1}), for T from Molien: eigenvalues of A."""
    group = in_rep.group
    eigenvalues = np.linalg.eigvals(group.elements)
    series = np.zeros((group.order, order + 1), complex)
    series[:, 0] = 1
    for k in range(group.dim):  # Π 1 / (1 - λ t), up to t^order
        for degree in range(1, order + 1):
            series[:, degree] += eigenvalues[:, k] * series[:, degree - 1]
    characters = [np.trace(r.matrices, axis1=1, axis2=2) for r in (out_rep, in_rep)]
    count = np.mean(series.sum(1).conj() * characters[0] * characters[1][group.inverse])
    assert abs(count - len(steerable.basis(in_rep, out_rep, order))) < 1e-9


@pytest.mark.parametrize("name", ["lifting", "group convolution", "quotients", "quotient to quotient"])
def test_orbit_form_and_average_span_the_same_space(name):
    """Between permutation-like fields the explicit orbits and the general average agree, degree by degree."""
    in_rep, out_rep, order = CASES[name]
    group = in_rep.group
    degrees = np.array([sum(a) for a in operators.multi_indices(group.dim, order)])
    norms = np.sqrt([math.prod(map(math.factorial, a)) / math.factorial(sum(a))
                     for a in operators.multi_indices(group.dim, order)])
    turn = operators.action(group.elements, order) * norms / norms[:, None]
    for degree in range(order + 1):
        at = degrees == degree
        arguments = turn[:, at][:, :, at], out_rep.matrices, in_rep.matrices[group.inverse]
        assert same_span(steerable.orbit_solutions(*arguments), steerable.average_solutions(*arguments))


@pytest.mark.parametrize("group, order", [(P8, 4), (P6M, 4), (CUBE, 2)], ids=lambda v: getattr(v, "name", v))
def test_lifting_is_the_trivial_to_regular_case(group, order):
    """(Ψf)(A) = p(A^{-1}∇) f with every polynomial p: H_A = p T(A)."""
    t = operators.action(group.elements, order)
    orbits = np.swapaxes(t, 0, 1).swapaxes(1, 2)[..., None]  # [p, operator, A, 1]
    assert same_span(steerable.basis(fields.trivial(group), fields.regular(group), order), orbits)


@pytest.mark.parametrize("group, order", [(P8, 2), (groups.dihedral(3), 2), (groups.tetrahedral(), 1)],
                         ids=lambda v: getattr(v, "name", v))
def test_group_convolution_is_the_regular_to_regular_case(group, order):
    """(ΦF)(A) = Σ_C p_{A^{-1}C}(A^{-1}∇) F(C), with any polynomial p_B for each relative element B."""
    t = operators.action(group.elements, order)
    n = t.shape[1]
    orbits = np.zeros((group.order, n, n, group.order, group.order))
    for a in range(group.order):
        for b in range(group.order):
            orbits[b, :, :, a, group.table[a, b]] = t[a]
    orbits = orbits.reshape(-1, *orbits.shape[2:])
    assert same_span(steerable.basis(fields.regular(group), fields.regular(group), order), orbits)


@pytest.mark.parametrize("group", [P8, P6M, CUBE, T_D, groups.icosahedral()], ids=lambda g: g.name)
def test_gradient_and_divergence_appear(group):
    """trivial -> vector and back at order 1: H_{d_i} = e_i; with reflections or in space they are the only ones."""
    scalar, vector = fields.trivial(group), fields.standard(group)
    expected = np.vstack([np.zeros(group.dim), np.eye(group.dim)]) / math.sqrt(group.dim)  # [operator, component]
    gradient, divergence = steerable.basis(scalar, vector, 1), steerable.basis(vector, scalar, 1)
    assert len(gradient) == len(divergence) == (2 if group is P8 else 1)
    np.testing.assert_allclose(gradient[0, :, :, 0], expected, atol=1e-12)
    np.testing.assert_allclose(divergence[0, :, 0, :], expected, atol=1e-12)


@pytest.mark.parametrize("group", [groups.cyclic(4), P6M, CUBE, groups.icosahedral(True)], ids=lambda g: g.name)
def test_laplacian_appears(group):
    """trivial -> trivial at order 2: the identity and the sum of second derivatives (no group here allows another)."""
    basis = steerable.basis(fields.trivial(group), fields.trivial(group), 2)[:, :, 0, 0]
    laplacian = [float(max(a) == 2) for a in operators.multi_indices(group.dim, 2)]
    found = [h for h in basis if same_span(h[None], np.array([laplacian]))]
    assert len(found) == 1 and len(basis) == 2
    np.testing.assert_allclose(np.abs(basis[0]), np.eye(len(laplacian))[0])


@pytest.mark.parametrize("group", [CUBE, groups.icosahedral()], ids=lambda g: g.name)
def test_curl_appears(group):
    """vector -> vector at order 1 in space: the identity and the curl, (curl F)_i = ε_{ijk} d_j F_k."""
    basis = steerable.basis(fields.standard(group), fields.standard(group), 1)
    curl = np.zeros((4, 3, 3))
    for i, j, k in [(0, 1, 2), (1, 2, 0), (2, 0, 1)]:
        curl[1 + j, i, k], curl[1 + k, i, j] = 1, -1
    assert len(basis) == 2
    np.testing.assert_allclose(basis[0, 0], np.eye(3) / math.sqrt(3), atol=1e-12)
    assert same_span(basis[1:], curl[None])


def test_curl_of_the_plane_appears():
    """vector -> determinant at order 1 with reflections: d_0 F_1 - d_1 F_0; it is odd, so none goes to the trivial one."""
    basis = steerable.basis(fields.standard(P6M), fields.determinant(P6M), 1)
    assert len(basis) == 1
    assert same_span(basis, np.array([[[[0, 0]], [[0, 1]], [[-1, 0]]]], float))


def test_no_operators_is_an_empty_basis():
    """Where nothing is equivariant the basis has length 0 and keeps its shape: no pseudoscalar from a scalar at order 2."""
    assert steerable.basis(*CASES["nothing"]).shape == (0, 6, 1, 1)


def test_relative_polynomials_are_local():
    """Regular -> regular: every basis operator is one derivative at the identity, for one relative element."""
    basis = steerable.basis(*CASES["group convolution"])
    at_identity = np.abs(basis[:, :, 0, :]) > 1e-12
    np.testing.assert_array_equal(at_identity.sum((1, 2)), 1)


def test_parts_do_not_mix():
    """Every basis operator joins one block of a direct sum to one other."""
    in_rep, out_rep, order = CASES["mixed"]
    for h in steerable.basis(in_rep, out_rep, order):
        used = [(r, c) for r, rows in enumerate(out_rep.blocks) for c, columns in enumerate(in_rep.blocks)
                if np.abs(h[:, rows][:, :, columns]).max() > 0]
        assert len(used) == 1


def test_icosahedral_group_convolution_is_fast_and_cached():
    """600 operators of 10 × 60 × 60 entries within 10 seconds and 2 GB; the second call returns the same array."""
    rep = fields.regular(groups.icosahedral())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    basis = steerable.basis(rep, rep, 2)
    assert time.perf_counter() - start < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2e9
    assert basis.shape == (600, 10, 60, 60)
    start = time.perf_counter()
    again = fields.regular(groups.icosahedral())
    assert steerable.basis(again, again, 2) is basis
    assert time.perf_counter() - start < 1
    with pytest.raises(ValueError):
        basis[0] = 0
    k = np.array([0.3, -0.7, 0.5])
    for a in (1, 17, 59):
        left = symbol(basis[::37], 3, 2, rep.group.elements[a] @ k) @ rep.matrices[a]
        np.testing.assert_allclose(left, rep.matrices[a] @ symbol(basis[::37], 3, 2, k), atol=1e-12)


def continuous(matrix, frequency):
    """The irreducible representations of O(2) up to a frequency, at any orthogonal matrix: from powers of x + iy."""
    sign = np.linalg.det(matrix)
    parts = [np.eye(1)]
    if frequency[1]:
        parts.append(np.array([[sign]]))
    for k in range(1, frequency[0] + 1):
        columns = [(complex(*matrix[:, 0])) ** k, 1j * sign * (complex(*matrix[:, 0])) ** k]
        parts.append(np.array([[z.real for z in columns], [z.imag for z in columns]]))
    result = np.zeros((sum(map(len, parts)),) * 2)
    at = 0
    for p in parts:
        result[at:at + len(p), at:at + len(p)] = p
        at += len(p)
    return result


@pytest.mark.parametrize("reflections", [False, True], ids=["SO(2)", "O(2)"])
@pytest.mark.parametrize("low, high, order", [(0, 1, 1), (1, 2, 2), (2, 2, 4), (0, 3, 3)])
def test_continuous_groups(reflections, low, high, order):
    """Band-limited fields: what commutes with enough rotations commutes with all, at random angles; more give the same."""
    make = groups.dihedral if reflections else groups.cyclic
    group = make(2 * high + order + 1)
    into, out = fields.band_limited(group, low, order), fields.band_limited(group, high, order)
    basis = steerable.basis(into, out, order)
    random = np.random.default_rng(0)
    k = random.normal(size=2)
    for t in random.uniform(0, 2 * np.pi, 20):
        matrix = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
        for a in [matrix, matrix @ np.diag([1.0, -1.0])] if reflections else [matrix]:
            left = symbol(basis, 2, order, a @ k) @ continuous(a, (low, reflections))
            right = continuous(a, (high, reflections)) @ symbol(basis, 2, order, k)
            np.testing.assert_allclose(left, right, atol=1e-10)
    finer = make(2 * high + order + 4)
    again = steerable.basis(fields.band_limited(finer, low, order), fields.band_limited(finer, high, order), order)
    assert same_span(basis, again)


@pytest.mark.parametrize("group, low, high, order", [
    (groups.icosahedral(), 1, 2, 1), (groups.icosahedral(), 0, 1, 3), (groups.octahedral(), 0, 1, 1),
    (groups.tetrahedral(), 0, 1, 0), (groups.icosahedral(True), 1, 1, 2), (groups.icosahedral(True), 0, 2, 1)], ids=str)
def test_continuous_groups_of_space(group, low, high, order):
    """What commutes with a solid's rotations commutes with all, at random ones, and with all reflections for O(3); there is
    one operator for each way in which degrees of input, operator (all below its order, in twos) and output make a triangle."""
    into, out = fields.band_limited(group, low, order), fields.band_limited(group, high, order)
    basis, reflections = steerable.basis(into, out, order), (np.linalg.det(group.elements) < 0).any()

    def continuous(matrix, most):
        parts = []
        for k in range(most + 1):
            part = fields.harmonics(matrix[None], k)[0]
            parts += [part, np.linalg.det(matrix) * part] if reflections else [part]
        result, at = np.zeros((sum(map(len, parts)),) * 2), 0
        for p in parts:
            result[at:at + len(p), at:at + len(p)] = p
            at += len(p)
        return result

    random = np.random.default_rng(0)
    for _ in range(10):
        matrix = np.linalg.qr(random.normal(size=(3, 3)))[0]
        matrix, k = matrix if reflections else matrix * np.linalg.det(matrix), random.normal(size=3)
        left = symbol(basis, 3, order, matrix @ k) @ continuous(matrix, low)
        np.testing.assert_allclose(left, continuous(matrix, high) @ symbol(basis, 3, order, k), atol=1e-10)
    ways = sum(abs(i - o) <= k <= i + o for degree in range(order + 1) for k in range(degree, -1, -2)
               for i in range(low + 1) for o in range(high + 1))
    assert len(basis) == ways * (2 if reflections else 1)


def test_too_few_rotations_would_let_strangers_in():
    """Why band_limited insists: with 2 L + order rotations there are operators that no other angle allows."""
    def count(n, order=4):
        group = groups.cyclic(n)
        t = 2 * np.pi * np.arange(n) / n
        matrices = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]).transpose(2, 0, 1)
        turn = fields.Representation("frequency 1", group, matrices)
        return len(steerable.basis(turn, turn, order))
    assert count(6) > count(7) == count(8) == count(20)


@pytest.mark.parametrize("order", [-1, -5])
def test_negative_order(order):
    """An order below 0: a clear error."""
    with pytest.raises(ValueError, match=f"order={order}"):
        steerable.basis(fields.trivial(P8), fields.trivial(P8), order)


def test_mismatched_groups():
    """Representations of two groups: the error names both."""
    with pytest.raises(ValueError, match="in_rep=.*p8.*out_rep=.*p6m"):
        steerable.basis(fields.trivial(P8), fields.regular(P6M), 2)
