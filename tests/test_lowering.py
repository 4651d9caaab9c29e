"""Lowerings: one table of cases in which all of them compute the same numbers, values and gradients."""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from pdo_jax import conv, groups, kernels, lowering, stencils

P4, P6, P8, P4M = groups.cyclic(4), groups.cyclic(6), groups.cyclic(8), groups.dihedral(4)
LINE, T, O_H = groups.reflection(1), groups.tetrahedral(), groups.octahedral(True)
POINT = groups.from_generators([-np.eye(3)], name="point reflection")


def shifted(alpha, size):
    """A scheme whose stencils are neither even nor odd, as a user may write."""
    return np.roll(stencils.central_difference(alpha, size), 1, axis=0)


class Case(NamedTuple):
    group: groups.Group
    space: tuple[int, ...]
    lifted: bool = True  # a group convolution; False: lifting
    size: int = 5
    basis: str | int = "paper"
    scheme: object = stencils.central_difference
    strides: tuple[int, ...] | None = None
    padding: tuple[tuple[int, int], ...] | None = None  # by default half the kernel
    channels: int = 3
    features: int = 2
    frame: float = 0.0


CASES = {
    "line, even": Case(LINE, (8,)),
    "line, lifting, odd, strided": Case(LINE, (9,), lifted=False, size=3, strides=(2,)),
    "line, fourth order": Case(LINE, (7,), basis=4, padding=((0, 3),)),
    "p8, reference": Case(P8, (6, 6), padding=((1, 1), (1, 1)), frame=math.pi / 8),
    "p8, lifting": Case(P8, (6, 6), lifted=False, channels=1, features=4),
    "p8, lifting, many channels": Case(P8, (6, 5), lifted=False, channels=9, features=1),
    "p6, strided, odd": Case(P6, (9, 7), strides=(2, 2)),
    "p6, strided, even, valid": Case(P6, (8, 9), strides=(3, 2), padding=((0, 0), (0, 0))),
    "p8, pointwise": Case(P8, (3, 4), size=1),
    "p8, pointwise, strided": Case(P8, (5, 5), size=1, strides=(2, 2)),
    "p4m, uneven padding": Case(P4M, (5, 6), size=3, basis=2, padding=((0, 2), (1, 3))),
    "p4, wide, third order": Case(P4, (7, 8), size=7, basis=3),
    "p3, no point reflection": Case(groups.cyclic(3), (6, 6), size=3),
    "p6m, lifting, strided": Case(groups.dihedral(6), (7, 7), lifted=False, size=3, strides=(2, 2)),
    "p1m": Case(groups.dihedral(1), (5, 4), size=3, basis=2),
    "mirror of axis 0": Case(groups.from_generators([np.diag([-1.0, 1])]), (5, 4), size=3, basis=2),
    "p5, fourth order": Case(groups.cyclic(5), (6, 5), basis=4, channels=2),
    "p2": Case(groups.cyclic(2), (5, 6), size=3, basis=2, strides=(2, 1)),
    "p24": Case(groups.cyclic(24), (5, 5), channels=1, features=1),
    "one element": Case(groups.cyclic(1), (5, 5), size=3),
    "p8, gaussian": Case(P8, (6, 6), scheme=stencils.gaussian_derivative),
    "p8, rbf, not separable": Case(P8, (6, 6), scheme=stencils.rbf_fd, basis=2),
    "p8, rbf, strided lifting": Case(P8, (7, 7), lifted=False, scheme=stencils.rbf_fd, basis=2, strides=(2, 2)),
    "p4, no parity": Case(P4, (6, 6), basis=2, scheme=shifted),
    "p4, one point": Case(P4, (5, 5), padding=((0, 0), (0, 0))),
    "T": Case(T, (4, 3, 5), size=3, channels=2),
    "O_h, lifting": Case(O_H, (4, 3, 3), lifted=False, size=3, channels=1),
    "point reflection, strided": Case(POINT, (5, 4, 5), basis=2, strides=(2, 1, 2)),
    "point reflection, pointwise": Case(POINT, (3, 2, 3), size=1),
    "T, rbf": Case(T, (3, 3, 3), size=3, basis=2, scheme=stencils.rbf_fd, channels=1),
}
ALL = pytest.mark.parametrize(("name", "case"), [
    pytest.param(name, case, id=f"{name}, {what}") for what, case in CASES.items() for name in lowering.LOWERINGS
    if name not in ("auto", "dense") and (name != "fourier" or case.group.dim == 2)])


def layer(case, name, dtype=None, **more):
    """A function of the parameters and the input."""
    bank = kernels.bank(case.group, case.size, case.basis, case.scheme, case.frame)

    def fn(w, x):
        return lowering.convolve(
            x, w, bank.stencils, bank.indices, strides=case.strides or (1,) * case.group.dim,
            padding=case.padding or ((case.size // 2,) * 2,) * case.group.dim, lowering=name,
            coefficients=kernels.Coefficients(bank, case.group if case.lifted else None), dtype=dtype,
            **conv.symmetry(case.group, bank, case.lifted) | more)

    return fn


def arguments(case):
    """Parameters and an input of about unit size."""
    random, components = np.random.default_rng(0), case.group.order if case.lifted else 1
    bank = kernels.bank(case.group, case.size, case.basis, case.scheme, case.frame)
    w = random.normal(size=(bank.turned.shape[1], case.channels, components, case.features))
    x = random.normal(size=(2, *case.space, case.channels, components))
    return jnp.asarray(w * bank.scale(case.channels * components), jnp.float32), jnp.asarray(x, jnp.float32)


@functools.lru_cache
def results(case, name, dtype=None, jit=jit):
    """The output, and the gradients to parameters and input for one random cotangent."""

    @jit
    def run(w, x, wave):
        y, pullback = jax.vjp(layer(case, name, dtype), w, x)
        return y, *pullback(wave[:y.size].reshape(y.shape).astype(y.dtype))

    return run(*arguments(case), np.random.default_rng(1).normal(size=20000).astype(np.float32))


def assert_close(found, expected, tolerance):
    """Relative in the Euclidean norm and, ten times looser, entry by entry against the largest."""
    for what, f, e in zip(("output", "parameters", "input"), found, expected, strict=True):
        f, e = np.asarray(f.astype(jnp.float32)), np.asarray(e.astype(jnp.float32))
        assert f.shape == e.shape, what
        assert np.linalg.norm(f - e) <= tolerance * np.linalg.norm(e), what
        np.testing.assert_allclose(f, e, atol=10 * tolerance * np.abs(e).max(), err_msg=what)


@ALL
def test_values_and_gradients_equal_dense(name, case):
    """float32: output and both gradients equal the dense convolution's to 1e-5."""
    found = results(case, name)
    assert found[0].dtype == found[1].dtype == found[2].dtype == jnp.float32
    assert_close(found, results(case, "dense"), 1e-5)


@ALL
def test_bfloat16_is_close_to_float32(name, case):
    """bfloat16 operands: within 2e-2 of the float32 dense convolution; parameters keep float32."""
    found = results(case, name, jnp.bfloat16)
    assert [v.dtype for v in found] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert_close(found, results(case, "dense"), 2e-2)


def test_dense_equals_a_plain_loop():
    """y[b, X, o, A] = Σ_n Σ_{i, C} c[n, i, C, o, A] Σ_K stencils[n, K] x[b, strides·X + K - padding, i, C]."""
    case, random = Case(P4, (5, 6), size=3, basis=2), np.random.default_rng(0)
    bank = kernels.bank(case.group, case.size, case.basis)
    c = random.normal(size=(len(bank.indices), 2, 4, 3, 4)).astype(np.float32)
    x = random.normal(size=(2, 5, 6, 2, 4)).astype(np.float32)
    y = lowering.convolve(jnp.asarray(x), jnp.asarray(c), bank.stencils, bank.indices, strides=(2, 1), padding=((1, 0), (2, 1)),
                          lowering="dense")
    padded, expected = np.pad(x, ((0, 0), (1, 0), (2, 1), (0, 0), (0, 0))), np.zeros((2, 2, 7, 3, 4))
    for b, i, j in np.ndindex(2, 2, 7):
        for n in range(len(bank.indices)):
            seen = sum(bank.stencils[n][k] * padded[b, 2 * i + k[0], j + k[1]] for k in np.ndindex(3, 3))
            expected[b, i, j] += np.einsum("ic,icoa->oa", seen, c[n])
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("channels", [1, 3])
def test_operators_in_any_order(channels):
    """Coefficients given as they are, with the operators in another order: "matmul" equals "dense", values and gradients."""
    bank, random = kernels.bank(P4, 5), np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 6, 5, channels, 1)), jnp.float32)
    c = jnp.asarray(random.normal(size=(len(bank.indices), channels, 1, 5, 1)), jnp.float32)
    order = random.permutation(len(bank.indices))

    @functools.partial(jit, static_argnums=0)
    def run(name, c, x):
        fn = functools.partial(lowering.convolve, stencils=bank.stencils[order], indices=[bank.indices[n] for n in order],
                               strides=(1, 1), padding=((2, 2), (2, 2)), lowering=name)
        y, pullback = jax.vjp(lambda c, x: fn(x, c[order]), c, x)
        return y, *pullback(jnp.cos(y))

    assert_close(run("matmul", c, x), run("dense", c, x), 1e-5)


@pytest.mark.parametrize("name", ["matmul", "fourier"])
def test_without_a_span(name):
    """Where nobody tells what the coefficients span, output and gradients equal dense all the same."""
    case, wave = CASES["p8, reference"], np.random.default_rng(1).normal(size=20000).astype(np.float32)

    @jit
    def run(w, x):
        y, pullback = jax.vjp(layer(case, name, span=None), w, x)
        return y, *pullback(wave[:y.size].reshape(y.shape))

    assert_close(run(*arguments(case)), results(case, "dense"), 1e-5)


def test_auto_is_one_of_the_lowerings():
    """"auto" gives the same numbers as dense, here compiled with all optimisations."""
    case = CASES["p8, reference"]
    assert_close(results(case, "auto", jit=jax.jit), results(case, "dense"), 1e-5)


def test_auto_on_a_cpu_follows_the_table():
    """"fourier" from the crossover on, where the layer commutes with a rotation of the plane; "dense" in float64."""
    turn, image = (conv.turn(P8, lifted) for lifted in (True, False))
    for dtype in map(jnp.dtype, (jnp.float32, jnp.bfloat16)):
        alone, differentiated = lowering.CROSSOVER[dtype.itemsize]
        assert lowering.on_cpu(alone, dtype, turn) == ("fourier", "fourier")
        assert lowering.on_cpu(alone - 1, dtype, turn) == ("matmul", "fourier")
        assert lowering.on_cpu(differentiated - 1, dtype, turn) == ("matmul", "matmul")
        assert lowering.on_cpu(alone, dtype, None) == lowering.on_cpu(alone, dtype, image) == ("matmul", "matmul")
    assert lowering.on_cpu(8, jnp.dtype(jnp.float64), turn) == ("dense", "dense")


def test_auto_takes_another_lowering_where_it_is_differentiated():
    """Between the two crossovers, forward alone equals "matmul" to the bit, and a forward pass with a pullback "fourier"."""
    case = Case(P4, (5, 5), size=3, channels=85, features=85)
    assert lowering.on_cpu(340, jnp.dtype(jnp.float32), conv.turn(P4, True)) == ("matmul", "fourier")
    alone = {name: jit(layer(case, name))(*arguments(case)) for name in ("auto", "matmul", "fourier")}
    np.testing.assert_array_equal(alone["auto"], alone["matmul"])
    assert (alone["matmul"] != alone["fourier"]).any()
    np.testing.assert_array_equal(results(case, "auto")[0], results(case, "fourier")[0])


@pytest.mark.parametrize("name", lowering.LOWERINGS[1:])
def test_inside_a_scan(name):
    """A scan over parameters, differentiated through, equals the loop written out."""
    case = Case(P8, (5, 5), size=3, channels=2, features=2)
    fn, (w, x) = layer(case, name), arguments(case)
    ws = jnp.stack([w, -w, 0.5 * w])

    def scanned(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(fn(w, x)), None), x, ws)[0]

    def looped(ws, x):
        return functools.reduce(lambda x, w: jnp.tanh(fn(w, x)), ws, x)

    found, expected = (jit(jax.value_and_grad(lambda ws, x, f=f: (f(ws, x) ** 2).sum(), (0, 1)))(ws, x)
                       for f in (scanned, looped))
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", lowering.LOWERINGS[1:])
def test_vmap(name):
    """vmap over parameters, over inputs and over both equals one call after another, and so does its gradient."""
    case = Case(P4, (5, 5), size=3, channels=2)
    fn, (w, x) = layer(case, name), arguments(case)
    single, ws, xs = jit(fn), jnp.stack([w, 2 * w, w**2]), jnp.stack([x, -x, x + 1])
    for axes in ((0, None), (None, 0), (0, 0)):
        found = jit(jax.vmap(fn, axes))(ws if axes[0] == 0 else w, xs if axes[1] == 0 else x)
        expected = [single(ws[k] if axes[0] == 0 else w, xs[k] if axes[1] == 0 else x) for k in range(3)]
        np.testing.assert_allclose(found, jnp.stack(expected), atol=1e-5)
    gradient = jax.grad(lambda w, x: (fn(w, x) ** 2).sum())
    single = jit(gradient)
    found, expected = jit(jax.vmap(gradient))(ws, xs), jnp.stack([single(w, x) for w, x in zip(ws, xs, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", lowering.LOWERINGS)
def test_bad_input(name):
    """A kernel larger than the padded input is named, with both sizes."""
    bank = kernels.bank(P4, 5)
    c, x = jnp.zeros((len(bank.indices), 1, 1, 1, 4)), jnp.zeros((1, 9, 3, 1, 1))
    call = functools.partial(lowering.convolve, x, c, bank.stencils, bank.indices, strides=(1, 1))
    with pytest.raises(ValueError, match=r"size 5 does not fit .*\(9, 3\)"):
        call(padding=((0, 0), (0, 1)), lowering=name)
    with pytest.raises(ValueError, match="one of .*dense"):
        call(padding=((2, 2), (2, 2)), lowering=name + "x")


def test_the_table_covers_every_axis_of_choice():
    """Cases with and without a fold, lifted and not, strided, padded unevenly, in one, two and three dimensions."""
    cases = CASES.values()
    assert {c.group.dim for c in cases} == {1, 2, 3}
    both = itertools.product((True, False), repeat=2)
    assert {(c.lifted, conv.fold(c.group, c.lifted) is not None) for c in cases} >= set(both) - {(False, False)}
    assert {c.size for c in cases} == {1, 3, 5, 7}
