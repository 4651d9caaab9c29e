"""The simulated flow against analytic fields, and what is said where its solver is missing."""

import sys

import numpy as np
import pytest

import pdo_jax as pdo
from experiments import datasets
from experiments.datasets import flow

P4M = pdo.groups.dihedral(4)


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
