"""Stencils: explicit entries first, then the laws of every scheme, then the order of convergence, then bad input.

In all tests a stencil is applied as a correlation: sum_k w[k] f(x + h k), k = 0 at the centre.
"""

import functools
import itertools
import math

import numpy as np
import pytest

from pdo_jax import stencils
from pdo_jax.stencils import bank, central_difference, gaussian_derivative, rbf_fd

polyharmonic = functools.partial(rbf_fd, kernel="polyharmonic")
SCHEMES = {
    "central": central_difference,
    "gaussian": gaussian_derivative,
    "gaussian, sigma 0.8": functools.partial(gaussian_derivative, sigma=0.8),
    "rbf gaussian": rbf_fd,
    "rbf gaussian, shape 1": functools.partial(rbf_fd, shape=1.0),
    "rbf polyharmonic": polyharmonic,
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def nodes(size, dim):
    """[size^dim, dim] float coordinates, 0 at the centre, in the order of w.ravel()."""
    axis = np.arange(size) - (size - 1) / 2
    return np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), axis=-1).reshape(-1, dim)


def multi_indices(dim, most):
    return [alpha for alpha in itertools.product(range(most + 1), repeat=dim) if sum(alpha) <= most]


# Explicit entries.


@pytest.mark.parametrize(
    "derivative, entries",
    [(0, [1]), (1, [-1 / 2, 0, 1 / 2]), (2, [1, -2, 1]), (3, [-1 / 2, 1, 0, -1, 1 / 2]), (4, [1, -4, 6, -4, 1])],
)
def test_second_order_central_differences_are_the_known_ones_padded_with_zeros(derivative, entries):
    for size in (5, 7):
        expected = np.zeros(size)
        start = (size - len(entries)) // 2
        expected[start : start + len(entries)] = entries
        np.testing.assert_array_equal(central_difference((derivative,), size), expected)


@pytest.mark.parametrize(
    "derivative, accuracy, numerators, denominator",
    [
        (1, 4, [1, -8, 0, 8, -1], 12),
        (2, 4, [-1, 16, -30, 16, -1], 12),
        (1, 6, [-1, 9, -45, 0, 45, -9, 1], 60),
        (2, 6, [2, -27, 270, -490, 270, -27, 2], 180),
        (3, 4, [1, -8, 13, 0, -13, 8, -1], 8),
        (4, 4, [-1, 12, -39, 56, -39, 12, -1], 6),
    ],
)
def test_central_differences_are_the_nearest_floats_to_the_rational_weights(
    derivative, accuracy, numerators, denominator
):
    weights = central_difference((derivative,), len(numerators), accuracy=accuracy)
    np.testing.assert_array_equal(weights, np.array(numerators) / denominator)


def test_axes_are_in_array_order_and_the_stencil_is_a_correlation():
    weights = central_difference((1, 0), 3)
    assert weights[0, 1] == -0.5 and weights[2, 1] == 0.5 and np.count_nonzero(weights) == 2
    mixed = central_difference((1, 0, 2), 5)
    assert mixed[1, 2, 1] == -0.5 and mixed[3, 2, 1] == 0.5 and mixed[3, 2, 2] == -1.0
    assert np.count_nonzero(mixed) == 6


def test_gaussian_on_three_points():
    g = math.exp(-1 / 2)  # sigma = 1 by default on three points
    smooth = np.array([g, 1, g]) / (1 + 2 * g)
    np.testing.assert_allclose(gaussian_derivative((0, 1), 3), np.outer(smooth, [-1 / 2, 0, 1 / 2]), atol=1e-15)
    np.testing.assert_allclose(gaussian_derivative((2, 0), 3), np.outer([1, -2, 1], smooth), atol=1e-15)


def test_gaussian_default_width_by_size():
    for size, sigma in [(3, 1.0), (5, 1.3), (7, 1.6)]:
        expected = gaussian_derivative((1, 2), size, sigma=sigma)
        np.testing.assert_allclose(gaussian_derivative((1, 2), size), expected, atol=1e-14)


@pytest.mark.parametrize("derivative", range(5))
def test_gaussian_on_many_points_is_the_sampled_derivative_of_a_gaussian(derivative):
    sigma, x = 1.5, nodes(31, 1)[:, 0]
    hermite = np.polynomial.hermite_e.hermeval(x / sigma, np.eye(5)[derivative]) / sigma**derivative
    sampled = hermite * np.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(gaussian_derivative((derivative,), 31, sigma=sigma), sampled, atol=1e-8)


def saddle_point(size, degree, phi, phi_alpha, alpha):
    """RBF-FD weights straight from the textbook's system, with monomials."""
    x = nodes(size, len(alpha))
    powers = multi_indices(len(alpha), degree)
    p = np.stack([np.prod(x**b, axis=1) for b in np.array(powers)], axis=1)
    system = np.block([[phi(np.linalg.norm(x[:, None] - x, axis=-1)), p], [p.T, np.zeros((p.shape[1],) * 2)]])
    right = [math.prod(map(math.factorial, alpha)) * (b == alpha) for b in powers]
    return np.linalg.solve(system, np.concatenate([phi_alpha(-x), right]))[: len(x)].reshape((size,) * len(alpha))


@pytest.mark.parametrize("size, degree", [(5, 2), (5, 3), (5, 4), (7, 3)])
def test_rbf_weights_solve_the_saddle_point_system(size, degree):
    eps = 0.8
    gaussian = lambda r: np.exp(-((eps * r) ** 2))  # noqa: E731
    expected = saddle_point(
        size, degree, gaussian, lambda x: 4 * eps**4 * x[:, 0] * x[:, 1] * gaussian(np.linalg.norm(x, axis=1)), (1, 1)
    )
    np.testing.assert_allclose(rbf_fd((1, 1), size, shape=eps, degree=degree), expected, atol=1e-10)
    expected = saddle_point(
        size, degree, lambda r: r**5, lambda x: 5 * np.sum(x**2, 1) ** 1.5 + 15 * x[:, 0] ** 2 * np.hypot(*x.T), (2, 0)
    )
    np.testing.assert_allclose(polyharmonic((2, 0), size, shape=5, degree=degree), expected, atol=1e-8)


@pytest.mark.parametrize("alpha", [(0, 1), (3, 1), (2, 4), (1, 2, 1), (8,)])
def test_derivatives_of_radial_functions(alpha):
    """Both kernels against a check of their own: Gaussians factor; a derivative of r^p is found by differences."""
    x = np.random.default_rng(0).uniform(0.6, 1.5, (4, len(alpha)))
    eps = 0.7
    hermite = [
        (-eps) ** a * np.polynomial.hermite.hermval(eps * xi, np.eye(9)[a]) * np.exp(-((eps * xi) ** 2))
        for a, xi in zip(alpha, x.T, strict=True)
    ]
    derivative = stencils._radial_derivative(functools.partial(stencils._RADIAL["gaussian"], eps), alpha, x)
    np.testing.assert_allclose(derivative, np.prod(hermite, axis=0), rtol=1e-11, atol=1e-12)
    weights, h = central_difference(alpha, 13, accuracy=6 if sum(alpha) < 8 else 4), 0.05
    around = np.linalg.norm(x[:, None] + h * nodes(13, len(alpha)), axis=-1) ** 9
    derivative = stencils._radial_derivative(
        lambda j, s: math.prod(9 / 2 - i for i in range(j)) * s ** (9 / 2 - j), alpha, x
    )
    np.testing.assert_allclose(around @ weights.ravel() / h ** sum(alpha), derivative, rtol=2e-3)


# Laws.


@every_scheme
@pytest.mark.parametrize("dim, sizes", [(1, (1, 3, 5, 7, 9)), (2, (1, 3, 5, 7, 9)), (3, (1, 3, 5))])
def test_exact_on_polynomials_for_every_derivative_that_the_size_carries(scheme, dim, sizes):
    """All |b| <= |alpha| + 1: x^b -> alpha! if b == alpha, else 0. Weights are finite and read-only."""
    for size in sizes:
        x = nodes(size, dim)
        for alpha in itertools.product(range(size), repeat=dim):
            weights = scheme(alpha, size)
            assert weights.shape == (size,) * dim and weights.dtype == np.float64 and not weights.flags.writeable
            assert np.isfinite(weights).all()
            powers = np.array(multi_indices(dim, min(sum(alpha) + 1, 6)))
            monomials = np.prod(x[:, None] ** powers, axis=-1)
            expected = math.prod(map(math.factorial, alpha)) * np.all(powers == alpha, axis=1)
            scale = 1 + np.abs(weights).ravel() @ np.abs(monomials)
            assert np.max(np.abs(weights.ravel() @ monomials - expected) / scale) < 1e-10


@pytest.mark.parametrize("scheme", [rbf_fd, polyharmonic])
@pytest.mark.parametrize("size", [7, 9])
def test_rbf_is_finite_on_large_3d_grids_at_every_order(scheme, size):
    for alpha in [(0, 0, 1), (1, 2, 3), (0, 0, size - 1), (3, 4, 6), (size - 1,) * 3, (4, size - 1, size - 1)]:
        weights = scheme(alpha, size)
        assert np.isfinite(weights).all()
        assert abs(weights.sum()) < 1e-8 * np.abs(weights).sum()  # of up to 24 derivatives on 729 nodes; processors differ


@every_scheme
def test_parity_is_exact(scheme):
    """Flipping axis i multiplies the weights by (-1)^alpha[i], to the last bit."""
    for alpha in [(3,), (4,), (1, 2), (0, 3), (2, 2), (1, 0, 2), (1, 1, 1), (2, 0, 2)]:
        weights = scheme(alpha, 5)
        for axis, a in enumerate(alpha):
            np.testing.assert_array_equal(np.flip(weights, axis), (-1) ** a * weights)


@every_scheme
def test_axis_swaps_are_exact(scheme):
    """scheme(permuted alpha) is the permuted array, to the last bit; so equal orders give symmetric weights."""
    for alpha in [(0, 1), (2, 2), (1, 3), (0, 1, 2), (1, 1, 1), (0, 0, 2), (2, 1, 2)]:
        for axes in itertools.permutations(range(len(alpha))):
            permuted = tuple(alpha[i] for i in axes)
            np.testing.assert_array_equal(scheme(permuted, 5), scheme(alpha, 5).transpose(axes))


@every_scheme
def test_constants_are_kept_by_order_zero_and_killed_by_all_others(scheme):
    for alpha in multi_indices(2, 4):
        assert abs(scheme(alpha, 5).sum() - (sum(alpha) == 0)) < 1e-12


def test_the_identity_is_a_delta_except_for_the_gaussian():
    for scheme in (central_difference, rbf_fd, polyharmonic):
        expected = np.zeros((5, 5))
        expected[2, 2] = 1
        np.testing.assert_array_equal(scheme((0, 0), 5), expected)


# Convergence: the slope of log error against log h, for f a sum of a sine and an exponential.


def smooth(x, alpha):
    """d^alpha of sin(a.x + 0.4) + exp(b.x) at points x [..., n]."""
    a, b = np.array([1.1, -0.7, 0.9])[: len(alpha)], np.array([0.4, 0.8, -0.5])[: len(alpha)]
    sine = np.prod(a**alpha) * np.sin(x @ a + 0.4 + sum(alpha) * math.pi / 2)
    return sine + np.prod(b**alpha) * np.exp(x @ b)


def measured_order(scheme, alpha, size, spacings):
    """Slope of the root mean square error over 50 points."""
    points = np.random.default_rng(1).uniform(-1, 1, (50, len(alpha)))
    weights, errors = scheme(alpha, size).ravel(), []
    for h in spacings:
        values = smooth(points[:, None] + h * nodes(size, len(alpha)), (0,) * len(alpha))
        errors.append(np.sqrt(np.mean((values @ weights / h ** sum(alpha) - smooth(points, alpha)) ** 2)))
    return np.polyfit(np.log(spacings), np.log(errors), 1)[0]


@pytest.mark.parametrize("accuracy", [2, 4, 6])
@pytest.mark.parametrize("alpha", [(1,), (2,), (3,), (4,), (1, 0), (1, 1), (2, 2), (0, 3), (1, 1, 0), (1, 0, 2)])
def test_central_differences_converge_with_their_accuracy(alpha, accuracy):
    scheme = functools.partial(central_difference, accuracy=accuracy)
    order = measured_order(scheme, alpha, 9, [0.3, 0.2, 0.15])
    assert abs(order - accuracy) < 0.1


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "central"])
@pytest.mark.parametrize(
    "alpha, size",
    [((1,), 3), ((2,), 5), ((3,), 5), ((4,), 7), ((1, 0), 3), ((1, 1), 5), ((2, 2), 5), ((0, 3), 7)]
    + [((1, 0, 0), 3), ((1, 1, 0), 5), ((2, 0, 1), 5)],
)
def test_gaussian_and_rbf_converge_with_order_two(name, alpha, size):
    order = measured_order(SCHEMES[name], alpha, size, [0.04, 0.03, 0.02])
    assert 1.9 < order < (2.1 if name.startswith("gaussian") else 4.1)


@pytest.mark.parametrize("scheme", [rbf_fd, polyharmonic])
def test_a_higher_degree_raises_the_order_of_rbf(scheme):
    order = measured_order(functools.partial(scheme, degree=4), (1, 0), 7, [0.2, 0.15, 0.1])
    assert abs(order - 4) < 0.2


# The bank.


def test_bank_stacks_read_only_and_takes_options_by_partial():
    alphas = multi_indices(2, 4)
    stack = bank(alphas, 5, functools.partial(gaussian_derivative, sigma=1.1))
    assert stack.shape == (15, 5, 5) and stack.dtype == np.float64 and not stack.flags.writeable
    for alpha, weights in zip(alphas, stack, strict=True):
        np.testing.assert_array_equal(weights, gaussian_derivative(alpha, 5, sigma=1.1))


def test_bank_takes_a_users_scheme_and_checks_it():
    doubled = bank([(1, 0)], 3, lambda alpha, size: 2 * central_difference(alpha, size))
    np.testing.assert_array_equal(doubled[0], 2 * central_difference((1, 0), 3))
    for wrong in (lambda alpha, size: np.ones(size), lambda alpha, size: np.full((size, size), np.nan)):
        with pytest.raises(ValueError, match=r"alpha=\(1, 0\), size=3 need finite weights"):
            bank([(1, 0)], 3, wrong)
    for alphas in ([], [(1,), (1, 0)]):
        with pytest.raises(ValueError, match="one or more multi-indices of one length"):
            bank(alphas, 3, central_difference)


# Bad input.


@every_scheme
@pytest.mark.parametrize(
    "alpha, smallest", [((1,), 3), ((2, 0), 3), ((0, 3), 5), ((4, 1), 5), ((5,), 7), ((0, 0, 6), 7)]
)
def test_too_small_a_size_names_the_smallest_that_works(scheme, alpha, smallest):
    with pytest.raises(ValueError) as error:
        scheme(alpha, smallest - 2)
    for part in (f"alpha={alpha}", f"size >= {smallest}", f"size={smallest - 2}"):
        assert part in str(error.value)
    scheme(alpha, smallest)


@pytest.mark.parametrize("alpha, accuracy, smallest", [((1,), 4, 5), ((0, 2), 6, 7), ((3,), 4, 7), ((4,), 6, 9)])
def test_too_small_a_size_for_the_accuracy(alpha, accuracy, smallest):
    with pytest.raises(ValueError) as error:
        central_difference(alpha, smallest - 2, accuracy=accuracy)
    for part in (f"alpha={alpha}", f"accuracy={accuracy}", f"size >= {smallest}", f"size={smallest - 2}"):
        assert part in str(error.value)
    assert central_difference(alpha, smallest, accuracy=accuracy).size == smallest ** len(alpha)


@every_scheme
def test_bad_multi_indices_and_sizes(scheme):
    for alpha in [(), 1, [1, 0], None, "12", (1.0,), (True,), (-1, 0), (math.nan,), (None,)]:
        with pytest.raises(ValueError, match="alpha must be a tuple of one or more integers >= 0"):
            scheme(alpha, 3)
    for size in [0, -3, 4, 3.0, True, None, "3", math.nan]:
        with pytest.raises(ValueError, match="size must be an odd integer >= 1"):
            scheme((1,), size)


def test_numpy_integers_are_integers():
    for scheme in SCHEMES.values():
        weights = scheme((np.int32(1), np.uint8(0)), np.uint8(3))
        np.testing.assert_array_equal(weights, scheme((1, 0), 3))


@pytest.mark.parametrize("accuracy", [0, 1, 3, -2, 2.0, True, None, "2"])
def test_bad_accuracy(accuracy):
    with pytest.raises(ValueError, match="accuracy must be an even integer >= 2"):
        central_difference((1,), 9, accuracy=accuracy)


@pytest.mark.parametrize("sigma", [0, -1.0, math.nan, math.inf, True, "1", 1j])
def test_bad_sigma(sigma):
    with pytest.raises(ValueError, match="sigma must be a finite number > 0"):
        gaussian_derivative((1,), 5, sigma=sigma)


@pytest.mark.parametrize("sigma", [1e-3, 1e-300])
def test_a_sigma_that_float64_cannot_carry(sigma):
    with pytest.raises(ValueError, match="cannot carry sigma="):
        gaussian_derivative((1, 2), 5, sigma=sigma)


@pytest.mark.parametrize("shape", [0, -1.0, math.nan, math.inf, 6, 1e300, True, "1"])
def test_bad_gaussian_shape(shape):
    with pytest.raises(ValueError, match="shape of a gaussian must be a number > 0 and < 6"):
        rbf_fd((1,), 5, shape=shape)


@pytest.mark.parametrize(
    "shape, alpha, size", [(0.01, (2,), 9), (0.05, (1, 0), 5), (0.1, (1, 1), 7), (1e-200, (1,), 7)]
)
def test_a_gaussian_shape_that_float64_cannot_resolve(shape, alpha, size):
    with pytest.raises(ValueError, match=f"shape={shape} is too small in float64"):
        rbf_fd(alpha, size, shape=shape)


@pytest.mark.parametrize("shape", [1, 2, 4, -3, 9, 3.0, True, math.nan])
def test_bad_polyharmonic_shape(shape):
    with pytest.raises(ValueError, match="odd int shape > 2 and <= 7"):
        polyharmonic((2,), 5, shape=shape)


@pytest.mark.parametrize("degree", [-1, 1, 5, 2.0, True, math.nan])
def test_bad_degree(degree):
    with pytest.raises(ValueError, match="integer degree from 2 to 4"):
        rbf_fd((1, 1), 5, degree=degree)


@pytest.mark.parametrize("kernel", ["multiquadric", None, ["gaussian"]])
def test_bad_kernel(kernel):
    with pytest.raises(ValueError, match="kernel must be one of"):
        rbf_fd((1, 1), 5, kernel=kernel)
