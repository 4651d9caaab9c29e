"""Stencils: the weights on a grid that stand for a partial derivative.

A *scheme* is a function `scheme(alpha, size)` of a multi-index (a tuple: alpha[i] times along axis i) and an odd number
of points per axis. It returns a read-only float64 array w of shape (size,) * len(alpha) such that, with spacing h,

    h^-|alpha| sum_k w[k] f(x + h (k - (size - 1) / 2))  ->  (d^alpha f)(x)      as h -> 0:

weights for spacing 1, correlated with f. Options are bound by `functools.partial(gaussian_derivative, sigma=1.0)`.
All three schemes are exact on polynomials of total degree <= |alpha| + 1, so the error is O(h^2) or better, and under
flips and axis swaps their weights change exactly as d^alpha does, to the last bit. Bad arguments raise ValueError.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from numbers import Integral, Real

import numpy as np

Scheme = Callable[[tuple[int, ...], int], np.ndarray]


def bank(alphas: Iterable[Sequence[int]], size: int | Sequence[int], scheme: Scheme,
         spacing: Sequence[float] | None = None) -> np.ndarray:
    """Stacks the stencils of several derivatives: a read-only float64 array [len(alphas), size, ..., size].

    Plain `central_difference` is taken with the accuracy that the size has room for beside the highest derivative along an
    axis: O(h^2) for order 4 on 5 points, O(h^4) for order 2 there or order 4 on 7; a partial that names one keeps it.

    A size for each axis gives tensor products of the scheme's stencils of one axis. With a `spacing` for each axis weights are
    divided by prod_i spacing[i]^alpha[i]: derivatives per unit of length, not per point.

    Raises ValueError for no alphas or alphas of several lengths, a bad spacing, and a scheme that returns another shape or NaN.

    >>> bank([(1,), (2,)], 3, central_difference, spacing=[0.5])
    array([[-1.,  0.,  1.],
           [ 4., -8.,  4.]])
    """
    alphas = [tuple(alpha) for alpha in alphas]
    if len({len(alpha) for alpha in alphas}) != 1:
        raise ValueError(f"bank: expected one or more multi-indices of one length, got {alphas}")
    dim, most = len(alphas[0]), max(map(max, alphas))
    sizes, spacing = axes_of("size", size, dim), (1.0,) * dim if spacing is None else tuple(spacing)
    if len(spacing) != dim or not all(_is_a(Real, h) and 0 < h < math.inf for h in spacing):
        raise ValueError(f"spacing must be a number > 0 for each of {dim} axes, got {spacing!r}")

    def weights(alpha, size):
        best = scheme
        if scheme is central_difference:  # all that the size has room for: 2 for order 4 on 5 points, as in the paper
            best = functools.partial(scheme, accuracy=max(2, size + 1 - 2 * ((most + 1) // 2)))
        w = np.asarray(best(alpha, size), np.float64)
        if w.shape != (size,) * len(alpha) or not np.isfinite(w).all():
            raise ValueError(f"bank: {alpha=}, {size=} need finite weights [{size}]*{len(alpha)}; the scheme gave {w}")
        return w

    def stencil(alpha):
        w = weights(alpha, sizes[0]) if len(set(sizes)) == 1 else _tensor_product(
            weights((d,), n) for d, n in zip(alpha, sizes, strict=True))
        return w / math.prod(h**d for h, d in zip(spacing, alpha, strict=True))

    return _frozen(np.stack([stencil(alpha) for alpha in alphas]))


def axes_of(what: str, size: int | Sequence[int], dim: int) -> tuple[int, ...]:
    """A number of points for each axis, from one for all or one each. Raises ValueError unless they are odd and positive."""
    sizes = tuple(size) if isinstance(size, Sequence) else (size,) * dim
    if len(sizes) != dim or not all(_is_a(Integral, n) and n > 0 and n % 2 for n in sizes):
        raise ValueError(f"{what} must be an odd positive int, or one for each of {dim} axes, got {size!r}")
    return tuple(map(int, sizes))


@functools.lru_cache(maxsize=128)
def _known(function, arguments, keywords):
    return functools.partial(function, *arguments, **dict(keywords))


def same(scheme: Scheme) -> Scheme:
    """The scheme, or for a ``functools.partial`` the first that said the same, so that what is cached by it is found again."""
    if not isinstance(scheme, functools.partial):
        return scheme
    try:
        return _known(same(scheme.func), scheme.args, tuple(sorted(scheme.keywords.items())))
    except TypeError:  # an option that cannot be hashed
        return scheme


def central_difference(alpha: Sequence[int], size: int, *, accuracy: int = 2) -> np.ndarray:
    """Central differences: the tensor product over axes of the narrowest 1-D stencils with error O(h^accuracy).

    The stencil of the d-th derivative on the points k = -m .. m, m = (d + 1) // 2 + accuracy / 2 - 1, solves the Taylor
    (Vandermonde) system in rational arithmetic, each weight then rounded once; d = 0 gives the delta:

        sum_k w[k] k^j = d! if j == d else 0,      j = 0 .. 2m.

    It is centred in `size`, padded with zeros. Raises ValueError unless accuracy is an even int >= 2 and size suffices.
    Source: B. Fornberg, "Generation of finite difference formulas on arbitrarily spaced grids", Math. Comp. 51 (1988).

    >>> central_difference((1,), 5, accuracy=4) * 12
    array([ 1., -8.,  0.,  8., -1.])
    """
    if not _is_a(Integral, accuracy) or accuracy < 2 or accuracy % 2:
        raise ValueError(f"central_difference: accuracy must be an even integer >= 2, got {accuracy!r}")
    alpha, size = _checked(alpha, size, int(accuracy))
    narrow = [_taylor(d, _width(d, int(accuracy))) for d in alpha]
    return _tensor_product(np.pad(w, (size - len(w)) // 2) for w in narrow)


def gaussian_derivative(alpha: Sequence[int], size: int, *, sigma: float | None = None) -> np.ndarray:
    """Derivatives of a Gaussian of width sigma: the tensor product over axes of discrete Gauss-Hermite stencils.

    The d-th derivative of a Gaussian is the Gaussian times a polynomial, and orthogonal to those of lower degree. A few
    samples lose this (three, sigma = 1: the second derivative is (0, -1, 0), not 0 on constants), so it is restored:

        w[k] = exp(-k^2 / (2 sigma^2)) p(k),   deg p = d,   sum_k w[k] k^j = d! if j == d else 0,   j = 0 .. d.

    It is also the derivative at 0 of the polynomial of degree d fitted to f with the Gaussian's weights, and, on a size
    of many sigmas, the sampled derivative itself. Error O(h^2) with sigma, in grid spacings, fixed: f is blurred, also
    along axes with d = 0. Default sigma = 0.55 + 0.15 size: 1.0 for 3 and 1.3 for 5 as in the source, 1.6 for 7.
    Raises ValueError for a size too small, for a sigma that is not finite and > 0, or that is too small for float64.
    Source: E. Jenner, M. Weiler, "Steerable Partial Differential Operators for Equivariant Neural Networks", ICLR 2022.

    >>> gaussian_derivative((1,), 5).round(3)
    array([-0.156, -0.189,  0.   ,  0.189,  0.156])
    """
    alpha, size = _checked(alpha, size)
    sigma = 0.55 + 0.15 * size if sigma is None else sigma
    if not (_is_a(Real, sigma) and 0 < sigma < math.inf):
        raise ValueError(f"gaussian_derivative: sigma must be a finite number > 0 (in grid spacings), got {sigma!r}")
    return _tensor_product(_gauss_hermite(d, size, float(sigma)) for d in alpha)


def rbf_fd(alpha: Sequence[int], size: int, *, kernel: str = "gaussian", shape: float | None = None,
           degree: int | None = None) -> np.ndarray:
    """RBF-FD: exact on radial functions phi_j(x) = phi(|x - x_j|) centred at the nodes x_j, and on polynomials.

    The weights solve the saddle-point system of the kernel and of all monomials x^b of total degree <= degree:

        sum_k w[k] phi_j(x_k) + sum_b lambda[b] x_j^b = (d^alpha phi_j)(0)      for every node j,
        sum_k w[k] x_k^b = alpha! if b == alpha else 0                          for every |b| <= degree.

    kernel "gaussian": phi(r) = exp(-(shape r)^2), 0 < shape < 6 (beyond, nodes do not see one another), default 0.5;
    smaller is smoother, but in 2-D and 3-D weights grow below 0.3, until float64 cannot resolve the system (an error).
    kernel "polyharmonic": phi(r) = r^shape, odd, |alpha| < shape <= 2 degree + 1, default the least >= |alpha| + 2;
    what float64 cannot resolve (high orders on large 3-D grids) is taken from full-width central differences.
    Error O(h^2), or O(h^(degree + 1 - |alpha|)); |alpha| <= degree <= max(|alpha| + 1, size - 1), default |alpha| + 1.
    Source: Flyer, Fornberg, Bayona, Barnett, "On the role of polynomials in RBF-FD approximations I", JCP 321 (2016).

    >>> rbf_fd((1,), 5).round(3)
    array([ 0.141, -0.783,  0.   ,  0.783, -0.141])
    """
    alpha, size = _checked(alpha, size)
    order, most = sum(alpha), max(sum(alpha) + 1, size - 1)
    degree = order + 1 if degree is None else degree
    if not _is_a(Integral, degree) or not order <= degree <= most:
        raise ValueError(f"rbf_fd: {alpha=}, {size=} need an integer degree from {order} to {most}, got {degree!r}")
    defaults = {"gaussian": 0.5, "polyharmonic": order + 3 - order % 2}
    if kernel not in tuple(defaults):
        raise ValueError(f"rbf_fd: kernel must be one of {tuple(defaults)}, got {kernel!r}")
    shape = defaults[kernel] if shape is None else shape
    if kernel == "gaussian" and not (_is_a(Real, shape) and 0 < shape < 6):  # exp(-6^2) is the rounding error of 1
        raise ValueError(f"rbf_fd: the shape of a gaussian must be a number > 0 and < 6, got {shape!r}")
    if kernel == "polyharmonic" and not (_is_a(Integral, shape) and shape % 2 and order < shape <= 2 * degree + 1):
        raise ValueError(f"rbf_fd: r^shape needs an odd int shape > {order} and <= {2 * degree + 1}, got {shape!r}")
    # The axes in sorted order share one system. A node takes its value from the one node to which the symmetries of
    # d^alpha (flips, swaps of equal axes) send it, so that these hold to the last bit.
    w, nodes = _rbf_weights(tuple(sorted(alpha)), size, kernel, float(shape), int(degree)), _nodes(size, len(alpha))
    home = np.sort(np.abs(nodes) + size * np.array(alpha), axis=1) - size * np.sort(alpha)
    signs = np.prod(np.sign(nodes) ** (np.array(alpha) % 2), axis=1)
    return _frozen((signs * w[tuple(home.T + size // 2)] + 0.0).reshape(w.shape))  # no -0.0


@functools.cache
def _taylor(derivative, width):
    """The 1-D stencil that is exact on all polynomials of degree < width: the derivatives at 0 of Lagrange's basis."""
    points, weights = range(-(width // 2), width // 2 + 1), []
    for k in points:
        poly = [Fraction(1)]  # coefficients of prod_{j != k} (x - j) / (k - j), constant first
        for j in set(points) - {k}:
            poly = [(lower - j * same) / (k - j) for lower, same in zip([0, *poly], [*poly, 0], strict=True)]
        weights.append(float(math.factorial(derivative) * poly[derivative]))
    return np.array(weights)


@functools.cache
def _gauss_hermite(derivative, size, sigma):
    """The 1-D stencil of `gaussian_derivative`: p is the last column of a QR decomposition on k >= 0, then mirrored."""
    k = np.arange(size // 2 + 1)
    powers = k[:, None] ** np.arange(derivative % 2, derivative + 1, 2.0)
    count = np.where(k > 0, 2, 1)  # the points of the whole grid that k stands for
    with np.errstate(all="ignore"):
        root = np.sqrt(count) * np.exp(-((k / sigma) ** 2) / 4)
        q, r = np.linalg.qr(root[:, None] * powers)
        half = root / count * q[:, -1] / r[-1, -1] * (k >= derivative % 2)  # an odd one is 0 at 0, not merely tiny
        if not np.abs((count * half) @ powers - np.eye(len(r))[-1]).max() < 1e-8:  # also if NaN
            raise ValueError(f"gaussian_derivative: float64 cannot carry {sigma=} for order {derivative} on {size=}")
    return math.factorial(derivative) * np.concatenate([(-1) ** derivative * half[:0:-1], half])


@functools.cache
def _rbf_weights(alpha, size, kernel, shape, degree):
    """Solves `rbf_fd`'s system as w = start + z c, z an orthonormal basis of what the polynomials leave free."""
    dim, nodes, radial = len(alpha), _nodes(size, len(alpha)), functools.partial(_RADIAL[kernel], shape)
    phi = radial(0, np.sum((nodes[:, None] - nodes) ** 2, axis=-1))
    start = functools.reduce(np.kron, [_taylor(d, size) for d in alpha])  # right on all polynomials of the grid
    q, _ = np.linalg.qr(np.polynomial.legendre.legvander(2 / size * _nodes(size, 1)[:, 0], size - 1))
    degrees = nodes + size // 2
    free = (degrees.sum(axis=1) > degree) & np.all(degrees % 2 == np.array(alpha) % 2, axis=1)
    z = functools.reduce(np.kron, [q] * dim)[:, free]
    eigenvalues, vectors = np.linalg.eigh(z.T @ phi @ z)
    resolved = np.abs(eigenvalues) > 100 * np.finfo(np.float64).eps * np.linalg.norm(phi, np.inf)
    if kernel == "gaussian" and not resolved.all():
        raise ValueError(f"rbf_fd: {shape=} is too small in float64 for {size}^{dim} nodes; choose a larger one")
    z = z @ vectors[:, resolved]
    c = z.T @ (_radial_derivative(radial, alpha, -nodes) - phi @ start) / eigenvalues[resolved]
    return (start + z @ c).reshape((size,) * dim)


def _radial_derivative(radial, alpha, x):
    """d^alpha of F(|x|^2) at points x [N, n]; radial(j, s) is the j-th derivative of F."""
    # Along one axis d^a F = sum_j binomial(j, a - j) a! / j! (2x)^(2j - a) F^(j)(s), a/2 <= j <= a; the axes multiply.
    s, total = np.sum(x**2, axis=1), 0.0
    for js in itertools.product(*[range((a + 1) // 2, a + 1) for a in alpha]):
        number = math.prod(math.comb(j, a - j) * math.perm(a, a - j) for a, j in zip(alpha, js, strict=True))
        total = total + number * np.prod((2.0 * x) ** (2 * np.array(js) - alpha), axis=1) * radial(sum(js), s)
    return total


_RADIAL = {  # j-th derivatives with respect to s = r^2; derivatives in x of r^p of order < p vanish at 0
    "gaussian": lambda eps, j, s: (-(eps**2)) ** j * np.exp(-(eps**2) * s),
    "polyharmonic": lambda p, j, s: math.prod(p / 2 - i for i in range(j)) * np.maximum(s, 1) ** (p / 2 - j) * (s > 0),
}


def _nodes(size, dim):
    return np.indices((size,) * dim).reshape(dim, -1).T - size // 2  # ints [size^dim, dim], 0 at the centre


def _tensor_product(factors):
    """[size, ..., size]; multiplied by size and not by axis, so that rounding too is the same under axis swaps."""
    grid = np.stack(np.meshgrid(*factors, indexing="ij"))
    return _frozen(np.prod(np.sort(np.abs(grid), axis=0), axis=0) * np.prod(np.sign(grid), axis=0) + 0.0)  # no -0.0


def _frozen(array):
    array.setflags(write=False)
    return array


def _checked(alpha, size, accuracy=2):
    """alpha and size in Python ints, once known to be good; for accuracy 2 size needs only to exceed every order."""
    if not isinstance(alpha, tuple) or not alpha or not all(_is_a(Integral, d) and d >= 0 for d in alpha):
        raise ValueError(f"alpha must be a tuple of one or more integers >= 0, one for each axis; got {alpha!r}")
    if not _is_a(Integral, size) or size < 1 or size % 2 == 0:
        raise ValueError(f"size must be an odd integer >= 1 (points per axis), got {size!r}")
    smallest = max(_width(int(d), accuracy) for d in alpha)
    if size < smallest:
        raise ValueError(f"{alpha=} with {accuracy=} needs size >= {smallest}, got {size=}")
    return tuple(int(d) for d in alpha), int(size)


def _width(derivative, accuracy):
    return 2 * ((derivative + 1) // 2) + accuracy - 1 if derivative else 1


def _is_a(kind, value):
    return isinstance(value, kind) and not isinstance(value, bool)
