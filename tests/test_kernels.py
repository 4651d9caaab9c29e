"""Kernels: the reference implementation's numbers, the action of the group, energies, variance, permutations, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

import pdo_jax as pdo
from pdo_jax import groups, kernels, lowering, stencils

P8, P6M, CUBE = groups.cyclic(8), groups.dihedral(6), groups.octahedral()
HALF_STEP = math.pi / 8
CLOSED = {
    "line": groups.reflection(1), "p4": groups.cyclic(4), "p6": groups.cyclic(6), "p8": P8, "p12": groups.cyclic(12),
    "p6m": P6M, "p8m": groups.dihedral(8), "T": groups.tetrahedral(), "O_h": groups.octahedral(True), "O": CUBE,
    "I": groups.icosahedral(), "I_h": groups.icosahedral(True),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lifting_kernel(w, bank):
    """[k, …, k, channels, features, order]."""
    c = kernels.Coefficients(bank)(jnp.asarray(w))
    kernel = np.asarray(lowering.expand(c, bank.stencils))
    return kernel.reshape(*kernel.shape[:-2], *c.shape[1:2], *c.shape[3:])


def group_kernel(w, bank, group):
    """[k, …, k, channels, order of the input, features, order of the output]."""
    c = kernels.Coefficients(bank, group)(jnp.asarray(w))
    kernel = np.asarray(lowering.expand(c, bank.stencils))
    return kernel.reshape(*kernel.shape[:-2], *c.shape[1:])


# The reference implementation, from its description: nine operators of at most two derivatives along each axis, turned
# by 2πk/8 + π/8; parameters are the pixels of a 3×3 kernel.

ONE_DIMENSIONAL = np.array([[0, 0, 1, 0, 0], [0, -0.5, 0, 0.5, 0], [0, 1, -2, 1, 0], [-0.5, 1, 0, -1, 0.5], [1, -4, 6, -4, 1]])
NINE = [(a, b) for a in range(3) for b in range(3)]


def reference_kernels():
    """[8, 9, 5, 5]: the kernel of each of nine pixels in each of eight orientations.

    d_0 becomes c X + s Y and d_1 becomes -s X + c Y, so d_0^a d_1^b is a homogeneous polynomial of degree a + b, whose
    coefficients are those of a product of polynomials in one variable.
    """
    untouched = np.stack([np.outer(ONE_DIMENSIONAL[a], ONE_DIMENSIONAL[b])[1:4, 1:4].ravel() for a, b in NINE])
    result = np.zeros((8, 9, 5, 5))
    for k in range(8):
        t = 2 * math.pi * k / 8 + math.pi / 8
        for j, (a, b) in enumerate(NINE):
            coefficients = np.ones(1)
            for linear in [(math.cos(t), math.sin(t))] * a + [(-math.sin(t), math.cos(t))] * b:
                coefficients = np.convolve(coefficients, linear)
            for power, coefficient in enumerate(coefficients):  # of X^(a + b - power) Y^power
                result[k, j] += coefficient * np.outer(ONE_DIMENSIONAL[a + b - power], ONE_DIMENSIONAL[power])
    return np.einsum("pj,kjxy->kpxy", np.linalg.inv(untouched), result)


@pytest.fixture(scope="module")
def reference():
    return reference_kernels()


@pytest.fixture(scope="module")
def paper():
    return kernels.bank(P8, 5, "paper", frame=HALF_STEP)


def test_lifting_kernel_equals_the_reference(reference, paper):
    """K[x, y, i, o, k] = Σ_p w[p, i, o] reference[k, p, x, y], to 1e-6, for p8 with frame π/8."""
    w = normal(9, 3, 1, 4)
    expected = np.einsum("pio,kpxy->xyiok", w[:, :, 0].astype(np.float64), reference)
    np.testing.assert_allclose(lifting_kernel(w, paper), expected, atol=1e-6 * np.abs(expected).max())


def test_group_kernel_equals_the_reference(reference, paper):
    """K[x, y, i, C, o, A] = Σ_p w[p, i, C - A, o] reference[A, p, x, y], to 1e-6, for p8 with frame π/8."""
    w = normal(9, 3, 8, 2)
    kernel = group_kernel(w, paper, P8)
    for a in range(8):
        for c in range(8):
            expected = np.einsum("pio,pxy->xyio", w[:, :, (c - a) % 8].astype(np.float64), reference[a])
            np.testing.assert_allclose(kernel[:, :, :, c, :, a], expected, atol=1e-6 * np.abs(expected).max())


def test_the_parameters_of_the_nine_operators_are_the_pixels_of_3x3_kernels():
    """Without a frame the kernel of the identity is w itself, in row-major order, zero around it."""
    w = normal(9, 1, 1, 1)
    kernel = lifting_kernel(w, kernels.bank(P8, 5, "paper"))[..., 0, 0, 0]
    np.testing.assert_allclose(kernel, np.pad(w.reshape(3, 3), 1), atol=1e-6)


def turned(kernel, matrix):
    """A kernel [k, …, k, …] carried by a matrix that maps the grid to itself: K'(x) = K(A^{-1}x)."""
    source = np.abs(matrix).argmax(1)
    kernel = np.transpose(kernel, [*source, *range(len(source), kernel.ndim)])
    return np.flip(kernel, [i for i in range(len(source)) if matrix[i, source[i]] < 0])


@pytest.mark.parametrize("group, size, basis, frame", [
    (groups.reflection(1), 5, "paper", 0.0), (P8, 5, "paper", 0.3), (groups.dihedral(4), 7, 3, 0.0), (P6M, 3, "paper", 0.0),
    (groups.octahedral(True), 3, 2, 0.0), (groups.icosahedral(), 3, 2, 0.0), (groups.tetrahedral(True), 5, "paper", 0.0),
])
def test_grid_preserving_elements_turn_the_kernels(group, size, basis, frame):
    """K_RA(x, …) = K_A(R^{-1}x, …) for lifting, and K_{RA,RC} likewise for group convolution."""
    bank = kernels.bank(group, size, basis, frame=frame)
    parameters = bank.turned.shape[1]
    lifted = lifting_kernel(normal(parameters, 1, 1, 1), bank)[..., 0, 0, :]
    convolved = group_kernel(normal(parameters, 1, group.order, 1), bank, group)[..., 0, :, 0, :]
    for r in np.flatnonzero(group.preserves_grid):
        moved = group.table[r]
        np.testing.assert_allclose(lifted[..., moved], turned(lifted, group.elements[r]), atol=2e-5)
        np.testing.assert_allclose(convolved[..., moved[:, None], moved], turned(convolved, group.elements[r]), atol=2e-5)


def test_a_frame_in_the_group_renumbers_the_orientations():
    """With frame F in S the bank of A is that of AF without a frame; an angle is the matrix of that rotation."""
    c, s = math.cos(HALF_STEP), math.sin(HALF_STEP)
    np.testing.assert_array_equal(kernels.frame_matrix(HALF_STEP, 2), [[c, -s], [s, c]])
    for group, basis in ((CUBE, 2), (groups.icosahedral(), "paper"), (P8, "paper")):
        plain, f = kernels.bank(group, 3, basis), 5
        framed = kernels.bank(group, 3, basis, frame=group.elements[f])
        np.testing.assert_allclose(framed.turned, plain.turned[group.table[:, f]], atol=1e-12)


@pytest.mark.parametrize("change, message", [
    (dict(kernel_size=4), "odd positive int"), (dict(kernel_size=-3), "odd positive int"),
    (dict(kernel_size=3.0), "odd positive int"), (dict(kernel_size=True), "odd positive int"),
    (dict(kernel_size=3, basis=3), "size >= 5"), (dict(kernel_size=1, basis=1), "size >= 3"),
    (dict(kernel_size=3, basis=4, scheme=stencils.gaussian_derivative), "size"),
    (dict(basis="papre"), '"paper" or an int'), (dict(basis=-1), '"paper" or an int'), (dict(basis=2.5), '"paper" or an int'),
    (dict(basis=True), '"paper" or an int'),
    (dict(frame=math.nan), "finite"), (dict(frame=np.eye(3)), "2×2"), (dict(frame=[[1, 0], [1, 1]]), "orthogonal"),
    (dict(frame=np.full((2, 2), np.inf)), "orthogonal"), (dict(group=CUBE, frame=0.3), "plane"),
    (dict(group=groups.reflection(1), frame=0.3), "plane"),
])
def test_bad_banks_are_named(change, message):
    """An even or small size, an unknown basis or a frame that does not fit raises ValueError that says what would do."""
    with pytest.raises(ValueError, match=message):
        kernels.bank(**{"group": P8, **change})


def spread(bank, rectified=True):
    energy = bank.energy(rectified)
    return energy.max() / energy.min()


def test_energy_of_the_papers_operators_spreads_by_nature():
    """Largest over smallest of all orientations: 1 for p4 and for p8 with frame π/8, at most 2 elsewhere, as documented."""
    assert spread(kernels.bank(groups.cyclic(4))) == pytest.approx(1, abs=1e-9)
    assert spread(kernels.bank(P8, frame=HALF_STEP)) == pytest.approx(1, abs=1e-9)
    for n, expected in ((6, 1.48), (12, 1.48), (8, 1.80)):
        assert spread(kernels.bank(groups.cyclic(n))) == pytest.approx(expected, abs=0.005)
    assert spread(kernels.bank(groups.dihedral(6))) < 2


@pytest.mark.parametrize("scheme", [stencils.central_difference, stencils.gaussian_derivative, stencils.rbf_fd])
@pytest.mark.parametrize("group", CLOSED.values(), ids=CLOSED)
def test_energy_of_closed_operators_is_alike(group, scheme):
    """All operators up to an order are closed under every group: all orientations have one energy (< 1.3 is promised)."""
    for order, size in ((1, 3), (2, 3), (2, 5)) + (((4, 5),) if group.dim < 3 and scheme is not stencils.rbf_fd else ()):
        bank = kernels.bank(group, size, order, scheme)
        assert spread(bank) < 1.3 and spread(bank, rectified=False) < 1.3, (order, size)


def test_energy_is_the_mean_square_response():
    """Bank.energy equals a Monte Carlo estimate over parameters and noise, white or rectified, for every orientation."""
    bank, random = kernels.bank(groups.cyclic(6)), np.random.default_rng(0)
    w = random.normal(size=(4000, bank.turned.shape[1]))
    responses = np.einsum("sp,apn,nx->sax", w, bank.turned, bank.stencils.reshape(len(bank.stencils), -1))
    noise = random.normal(size=(len(w), responses.shape[-1]))
    for rectified in (False, True):
        x = np.maximum(noise, 0) * math.sqrt(2) if rectified else noise  # mean square 1
        estimate = (np.einsum("sax,sx->sa", responses, x) ** 2).mean(0)
        np.testing.assert_allclose(estimate, bank.energy(rectified), rtol=0.15)


VARIANCES = {
    "line": (groups.reflection(1), (24,), 5, "paper", 0.0, 32), "p8 framed": (P8, (8, 8), 5, "paper", HALF_STEP, 16),
    "p6": (groups.cyclic(6), (8, 8), 3, 2, 0.0, 24), "p4m": (groups.dihedral(4), (8, 8), 5, "paper", 0.0, 16),
    "T": (groups.tetrahedral(), (4, 4, 4), 3, 2, 0.0, 8), "I": (groups.icosahedral(), (3, 3, 3), 3, 2, 0.0, 8),
}


@pytest.mark.parametrize("group, space, size, basis, frame, channels", VARIANCES.values(), ids=VARIANCES)
def test_activations_keep_unit_variance_at_initialisation(group, space, size, basis, frame, channels):
    """Mean square 1 behind lifting, and behind layer after layer of group convolution and ReLU.

    The mean is over orientations, channels, points and seeds. The first two layers are in the state that the scale assumes
    (independent values) and must hold it to 10 %; deeper, neighbouring values are correlated and finite widths fluctuate,
    which a factor of 2 after six layers allows for.
    """
    options = dict(features=channels, group=group, kernel_size=size, basis=basis, frame=frame, padding="CIRCULAR")
    lifting, conv, seeds = pdo.LiftingConv(**options), pdo.GroupConv(**options), 12

    @jit
    def first(key):
        noise, weights = jax.random.split(key)
        return lifting.init_with_output(weights, jax.random.normal(noise, (2, *space, 3)))[0]

    @jit
    def following(y, key):
        y = conv.init_with_output(key, jax.nn.relu(y))[0]
        return y, (y**2).mean()

    squares = np.zeros((seeds, 6))
    for seed in range(seeds):
        keys = jax.random.split(jax.random.key(seed), 6)
        y = first(keys[0])
        squares[seed, 0] = (y**2).mean()
        for layer in range(1, 6):
            y, squares[seed, layer] = following(y, keys[layer])
    mean = squares.mean(0)
    np.testing.assert_allclose(mean[:2], 1, atol=0.1)
    assert (mean > 0.5).all() and (mean < 2).all(), mean


def plain_gather(turned, group):
    """[n, i, f, A, relative element] -> [n, i, C, f, A], by indexing."""
    relative = group.table[group.inverse]
    return turned[..., np.arange(group.order)[:, None], relative].transpose(0, 1, 4, 2, 3)


@pytest.mark.parametrize("group", [groups.dihedral(3), groups.tetrahedral(), groups.cyclic(5)], ids=["p3m", "T", "p5"])
def test_group_coefficients_equal_a_plain_loop(group):
    """c[n, i, C, o, A] = Σ_p turned[A, p, n] w[p, i, A^{-1}C, o], entry by entry, with A^{-1}C from the matrices."""
    bank = kernels.bank(group, 3, "paper")
    w = normal(bank.turned.shape[1], 2, group.order, 3)
    c = np.asarray(kernels.Coefficients(bank, group)(jnp.asarray(w)))
    assert c.shape == (len(bank.indices), 2, group.order, 3, group.order)
    for a in range(group.order):
        for b in range(group.order):
            relative = group.index(group.elements[a].T @ group.elements[b])
            expected = np.einsum("pn,pio->nio", bank.turned[a], w[:, :, relative])
            np.testing.assert_allclose(c[:, :, b, :, a], expected, atol=1e-5)


@pytest.mark.parametrize("group", [groups.dihedral(3), groups.tetrahedral()], ids=["p3m", "T"])
def test_gradient_of_group_coefficients_is_that_of_a_gather(group):
    """The hand-written transpose (a permutation) equals automatic differentiation of plain indexing."""
    bank = kernels.bank(group, 3, "paper")
    w = jnp.asarray(normal(bank.turned.shape[1], 2, group.order, 3))
    g = jnp.asarray(normal(len(bank.indices), 2, group.order, 3, group.order, seed=1))

    def plain(w):
        return plain_gather(jnp.einsum("picf,apn->nifac", w, jnp.asarray(bank.turned, w.dtype)), group)

    value, pullback = jax.vjp(lambda w: kernels.Coefficients(bank, group)(w), w)
    expected, plain_pullback = jax.vjp(plain, w)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_allclose(pullback(g)[0], plain_pullback(g)[0], atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_factored_kernel_is_the_closest_of_its_rank(rank):
    """The sum of squares that it misses is that of the singular values left out (Eckart, Young 1936); with all, nothing."""
    w = normal(6, 2, 4, 3)  # 8 × 18: rank 8
    mix, kernel = kernels.factor(w, rank)
    assert mix.shape == (2, 4, rank) and kernel.shape == (6, rank, 3)
    values = np.linalg.svd(w.transpose(1, 2, 0, 3).reshape(8, 18), compute_uv=False)
    missing = w - kernels.product(mix, kernel)
    np.testing.assert_allclose(np.square(missing).sum(), np.square(values[rank:]).sum(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("transpose", [False, True])
def test_a_layer_of_full_rank_is_the_whole_layer(transpose):
    """Factored at full rank a layer gives what it gave, and its parameters are those of the layer with that rank."""
    group, x = groups.cyclic(4), normal(2, 6, 6, 2, 4)
    layer = pdo.GroupConv(3, group, kernel_size=3, basis=2, strides=2, transpose=transpose, use_bias=True)
    whole = layer.init(jax.random.key(0), x)["params"] | {"bias": jnp.arange(3.0)}
    small = layer.clone(rank=8 + 4 * transpose)  # of 2 · 4 or, transposed, 3 · 4
    params = kernels.factored(whole, jax.eval_shape(small.init, jax.random.key(0), x)["params"])
    y, expected = small.apply({"params": params}, x), layer.apply({"params": whole}, x)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_what_cannot_be_factored_is_named():
    """Another network is refused, by the parameter that differs."""
    layer, x = pdo.GroupConv(3, groups.cyclic(4), kernel_size=3), normal(1, 4, 4, 2, 4)
    whole = layer.init(jax.random.key(0), x)["params"]
    for other in (layer.clone(features=4, rank=2), layer.clone(rank=2, use_bias=True)):
        like = jax.eval_shape(other.init, jax.random.key(0), x)["params"]
        with pytest.raises(ValueError, match=r"(kernel|bias) has shape .* in the network with ranks"):
            kernels.factored(whole, like)
