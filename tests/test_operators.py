"""Operators: multi-indices, and the matrix by which an orthogonal matrix acts on them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdo_jax import groups, operators

CASES = st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2 ** 32 - 1)).filter(lambda c: c[0] < 4 or c[1] < 4)
PROPERTY = settings(max_examples=25, deadline=None, database=None)


def orthogonal(dim, random):
    return np.linalg.qr(random.normal(size=(dim, dim)))[0]


@pytest.mark.parametrize("dim, order", list(itertools.product(range(1, 6), range(5))))
def test_multi_indices_are_complete(dim, order):
    """Each multi-index of degree <= order stands there once, C(dim + order, order) in all, by rising degree."""
    indices = operators.multi_indices(dim, order)
    assert len(set(indices)) == len(indices) == math.comb(dim + order, order)
    assert all(len(a) == dim and min(a) >= 0 and sum(a) <= order for a in indices)
    assert [sum(a) for a in indices] == sorted(sum(a) for a in indices)


@pytest.mark.parametrize("dim, order", [(0, 1), (2, -1)])
def test_bad_multi_indices(dim, order):
    """A dimension below 1 or an order below 0: a clear error."""
    with pytest.raises(ValueError, match=f"dim={dim}, order={order}"):
        operators.multi_indices(dim, order)


def test_paper_basis():
    """Nine operators on 5×5, six on 3×3, one on 1×1; per-axis order <= 2; 27 - 7 with total order <= 4 in space."""
    assert set(operators.paper_basis(2, 5)) == set(itertools.product(range(3), repeat=2))
    assert operators.paper_basis(2, 3) == operators.multi_indices(2, 2)
    assert operators.paper_basis(2, 1) == ((0, 0),)
    assert set(operators.paper_basis(3, 5)) == {a for a in itertools.product(range(3), repeat=3) if sum(a) <= 4}
    assert operators.paper_basis(1, 5) == ((0,), (1,), (2,))


@PROPERTY
@given(CASES)
def test_action_reverses_products(case):
    """T(AB) = T(B) T(A), T(1) = 1, T(A^{-1}) = T(A)^{-1}."""
    dim, order, seed = case
    random = np.random.default_rng(seed)
    a, b = orthogonal(dim, random), orthogonal(dim, random)
    t = operators.action(np.stack([a, b, a @ b, np.eye(dim), a.T]), order)
    np.testing.assert_allclose(t[2], t[1] @ t[0], atol=1e-12)
    np.testing.assert_array_equal(t[3], np.eye(len(t[3])))
    np.testing.assert_allclose(t[4] @ t[0], np.eye(len(t[3])), atol=1e-12)


@PROPERTY
@given(CASES)
def test_action_is_block_diagonal(case):
    """An operator of degree k becomes one of degree k; on degree 0 T is 1, on degree 1 it is A transposed."""
    dim, order, seed = case
    a = orthogonal(dim, np.random.default_rng(seed))
    t = operators.action(a, order)
    degree = np.array([sum(i) for i in operators.multi_indices(dim, order)])
    assert (t[degree[:, None] != degree] == 0).all()
    np.testing.assert_array_equal(t[degree == 0][:, degree == 0], 1)
    if order:
        np.testing.assert_allclose(t[degree == 1][:, degree == 1], a.T)


@PROPERTY
@given(CASES)
def test_lower_orders_are_corners_of_higher_ones(case):
    """T up to an order is the leading corner of T up to a higher one."""
    dim, order, seed = case
    a = orthogonal(dim, np.random.default_rng(seed))
    n = len(operators.multi_indices(dim, order))
    np.testing.assert_allclose(operators.action(a, order + 1)[:n, :n], operators.action(a, order), atol=1e-13)


def test_grid_preserving_elements_permute_operators():
    """For the 48 signed permutations T is a signed permutation, exactly."""
    t = operators.action(groups.octahedral(True).elements, 4)
    assert set(np.unique(t)) == {-1, 0, 1}
    np.testing.assert_array_equal(np.abs(t).sum(-1), 1)


# Polynomials as {powers: coefficient}: an oracle that knows nothing of the module.
def multiply(p, q):
    result = {}
    for (a, x), (b, y) in itertools.product(p.items(), q.items()):
        key = tuple(np.add(a, b).tolist())
        result[key] = result.get(key, 0.0) + x * y
    return result


def derivative(p, alpha):
    for axis, times in enumerate(alpha):
        for _ in range(times):
            p = {(*a[:axis], a[axis] - 1, *a[axis + 1:]): c * a[axis] for a, c in p.items() if a[axis]}
    return p


def substitute(p, matrix):
    """The polynomial x -> p(matrix x)."""
    dim, result = len(matrix), {}
    for a, c in p.items():
        term = {(0,) * dim: c}
        for axis, times in enumerate(a):
            for _ in range(times):
                term = multiply(term, {tuple(np.eye(dim, dtype=int)[j].tolist()): matrix[axis, j] for j in range(dim)})
        result = {k: result.get(k, 0.0) + term.get(k, 0.0) for k in {*result, *term}}
    return result


def operate(coefficients, indices, p):
    result = {}
    for c, alpha in zip(coefficients, indices, strict=True):
        for k, v in derivative(p, alpha).items():
            result[k] = result.get(k, 0.0) + c * v
    return result


@settings(max_examples=15, deadline=None, database=None)
@given(st.integers(1, 3), st.integers(0, 4), st.integers(0, 2 ** 32 - 1))
def test_turned_operator_on_turned_polynomial(dim, order, seed):
    """π_A p(∇) f = p(A^{-1}∇) π_A f for polynomials f, where (π_A f)(x) = f(A^{-1}x): derivatives taken exactly."""
    random = np.random.default_rng(seed)
    a, indices = orthogonal(dim, random), operators.multi_indices(dim, order)
    c = random.normal(size=len(indices))
    f = {i: random.normal() for i in operators.multi_indices(dim, 5)}
    left = substitute(operate(c, indices, f), a.T)
    right = operate(c @ operators.action(a, order), indices, substitute(f, a.T))
    for key in {*left, *right}:
        assert abs(left.get(key, 0.0) - right.get(key, 0.0)) < 1e-9 * 120


def test_quarter_turn_of_second_derivatives():
    """By hand: at 90° d_0 -> d_1 and d_1 -> -d_0, so that d_00 <-> d_11 and d_01 -> -d_01."""
    t = operators.action([[0, -1], [1, 0]], 2)[3:, 3:]  # d_00, d_01, d_11
    np.testing.assert_array_equal(t, [[0, 0, 1], [0, -1, 0], [1, 0, 0]])


def test_eighth_turn_of_second_derivatives():
    """By hand: at 45° d_00 -> (d_0 + d_1)² / 2."""
    t = operators.action(groups.cyclic(8).elements[1], 2)[3]
    np.testing.assert_allclose(t, [0, 0, 0, 0.5, 1, 0.5], atol=1e-15)
