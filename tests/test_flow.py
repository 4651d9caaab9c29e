"""The simulated flow against analytic fields, and what is said where its solver is missing."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdo_jax as pdo
from experiments import datasets
from experiments import flow as rollouts
from experiments.baselines import ResidualCNN
from experiments.datasets import Split, flow
from experiments.residual import ResidualNet

P4M = pdo.groups.dihedral(4)
VECTOR = pdo.fields.standard(P4M)


def test_velocities_of_analytic_vorticities():
    """w = a cos(3 x + 2 y) is that of the stream function -w / 13; waves that the coarse grid cannot carry are left out."""
    x, y = np.meshgrid(*[2 * np.pi * np.arange(flow.FINE) / flow.FINE] * 2, indexing="ij")
    w = np.stack([4 * np.cos(3 * x + 2 * y), np.cos(40 * x) + np.sin(32 * y)])
    u = flow.velocity(w)
    coarse = np.s_[:: flow.FINE // flow.SIZE, :: flow.FINE // flow.SIZE]
    slope = 4 / 13 * np.sin(3 * x + 2 * y)[coarse]
    np.testing.assert_allclose(u[0], np.stack([2 * slope, -3 * slope], -1), atol=1e-12)
    np.testing.assert_allclose(u[1], 0, atol=1e-12)


def test_the_start_has_no_direction_and_is_the_same_every_time():
    w = flow.start(16, 3)
    np.testing.assert_array_equal(w, flow.start(16, 3))
    u = flow.velocity(w)
    np.testing.assert_allclose((u**2).sum(-1).mean((1, 2)), 1, rtol=1e-5)
    assert abs((u[..., 0] ** 2).mean() / (u[..., 1] ** 2).mean() - 1) < 0.1 and not np.array_equal(w, flow.start(16, 4))


@pytest.mark.parametrize("element", range(8))
def test_the_velocity_turns_as_a_vector_and_the_vorticity_as_a_pseudoscalar(element):
    """Exactly, if both grids of the torus are turned about their first point."""
    mirrored = [1 + axis for axis in range(2) if P4M.elements[element][axis].sum() < 0]
    turn = lambda x, rep: np.roll(pdo.fields.act(x[:, :, :, None], rep(P4M), element), 1, mirrored)[:, :, :, 0]
    w = flow.start(1, 0)
    found = flow.velocity(turn(w[..., None], pdo.fields.determinant)[..., 0])
    np.testing.assert_allclose(found, turn(flow.velocity(w).astype(np.float32), pdo.fields.standard), atol=1e-5)


def test_a_missing_solver_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "exponax", None)
    with pytest.raises(datasets.DataError, match="^the flow .* not installed: pip install exponax$"):
        datasets.load("flow/16", data_dir=tmp_path)
    assert not (tmp_path / "flow").exists()


def waves(*numbers):
    """Velocities [n, SIZE, SIZE, 1, 2] along their gradient, and across it, of waves with these wave numbers."""
    x = 2 * np.pi * np.indices((flow.SIZE, flow.SIZE)) / flow.SIZE
    slopes = np.stack([np.sin(k * x[0] + m * x[1])[..., None] * np.array([k, m]) for k, m in numbers])
    return slopes[:, :, :, None], (slopes @ np.array([[0, 1], [-1, 0]]))[:, :, :, None]


def test_what_a_state_is_said_to_be():
    """Gradients are taken out and all else is left; the curl is that of a known field; the spectrum adds up to the energy."""
    along, across = waves((3, -5), (0, 7), (31, 2))
    np.testing.assert_allclose(rollouts.without_divergence(along + across + 0.5), across + 0.5, atol=1e-3)
    x, y = 2 * np.pi * np.indices((flow.SIZE, flow.SIZE)) / flow.SIZE
    np.testing.assert_allclose(rollouts.vorticity(across[0]), 34 * np.cos(3 * x - 5 * y), atol=1e-9)
    power = rollouts.spectrum(across[:2])
    assert power.shape == (flow.SIZE // 2 - 1,) and set(np.flatnonzero(power > 1e-9) + 1) == {6, 7}
    np.testing.assert_allclose(power.sum(), (across[:2] ** 2).sum(-1).mean() / 2)


def test_a_rollout_and_its_errors(monkeypatch):
    """Pairs in order are a trajectory; a law that is known is followed; one with a direction does not turn with the group."""
    monkeypatch.setattr(flow, "STEPS", 3)
    monkeypatch.setattr(rollouts, "TOLD", (1, 3))
    start = flow.velocity(flow.start(2, 0))[:, :, :, None].astype(np.float32)
    true = start[:, None] * 0.9 ** np.arange(4).reshape(4, 1, 1, 1, 1).astype(np.float32)
    test = Split(true[:, :-1].reshape(6, *start.shape[1:]), np.diff(true, axis=1).reshape(6, *start.shape[1:]))
    np.testing.assert_allclose(rollouts.trajectories(test), true, atol=1e-6)
    for network, error in ((lambda u: -0.1 * u, 0), (lambda u: -0.2 * u * np.array([1, 0]), 0.1 / 0.9)):
        told = rollouts.measures(network, test, true, rollouts.rollout(network, start, 3))
        assert told["one_step_error"] == pytest.approx(error, abs=1e-5)
        for errors in (told["turned_rollout_error"], told["rollout_error"]):
            assert errors.keys() == {"1", "3"} and all((value > 0.01) == bool(error) for value in errors.values())


def test_the_stencil_of_what_carries_along(monkeypatch):
    """A network that moves every field along axis 0 has the stencil of that, as the law has without viscosity."""
    monkeypatch.setattr(flow, "VISCOSITY", 0.0)
    fields = np.zeros((1, flow.SIZE, flow.SIZE, 1, 2), np.float32)
    fields[:, 10:12, 20, :, 0] = rollouts.MOVED * 2 * np.pi / flow.SIZE / flow.STEP
    found = rollouts.stencil(lambda u: jnp.roll(u, rollouts.MOVED, 1) - u, fields)
    np.testing.assert_allclose(found, rollouts.carried(), atol=1e-6)
    assert found[0, flow.SIZE // 2, flow.SIZE // 2] == -1 and found[0, flow.SIZE // 2 - rollouts.MOVED, flow.SIZE // 2] == 1


def test_the_residual_network_turns_with_the_flow():
    """Under every element of p4m; the plain one of the same layout does not."""
    u = jnp.asarray(flow.velocity(flow.start(1, 0)), jnp.float32)[:, ::4, ::4, None]
    for network, turns in ((ResidualNet(VECTOR, 2, 1), True), (ResidualCNN(8, 1), False)):
        found, variables = jax.jit(functools.partial(network.init_with_output, train=False))(jax.random.key(0), u)
        assert found.shape == u.shape
        apply = jax.jit(functools.partial(network.apply, variables, train=False))
        assert (pdo.equivariance.error(apply, u, P4M, in_rep=VECTOR, out_rep=VECTOR).max() < 1e-5) == turns
