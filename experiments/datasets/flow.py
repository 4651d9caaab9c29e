"""Decaying turbulence of an incompressible fluid in the plane: pairs of a velocity field and its change over one step.

The Navier-Stokes equations on a torus of side 2π, in the vorticity w of the velocity u, with Δψ = w:

    ∂w/∂t + u · ∇w = VISCOSITY Δw,      u = (∂ψ/∂x_1, -∂ψ/∂x_0),

by the pseudo-spectral solver of `exponax`, on FINE² points; the data are the lower wave numbers, on SIZE² points. At the start
w is noise of wave numbers near 5, of no direction, with a root mean square of |u| of 1; the first WARM steps are left out. All
of it turns with rotations, mirrors and shifts of the torus.
"""

import hashlib
import importlib.metadata

import jax
import numpy as np
import tensorflow_datasets as tfds

from .builders import Builder
from .sources import DataError

SIZE, FINE, VISCOSITY = 64, 128, 2e-3
STEP, SUBSTEPS, WARM = 0.2, 10, 10  # of time, of the solver in it, and of it before the first pair
TRAJECTORIES = {"train": 64, "test": 8}
STEPS = 50  # of a trajectory
EVERY = {"train": 5, "test": 1}  # of them; those for training are apart, so that few of them say much
AT_ONCE = 8  # trajectories
SEED = 0


class Flow(Builder, skip_registration=True):
    """Decaying turbulence in two dimensions: velocity fields, and their changes over a step, made by a spectral solver."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE, DTYPE, HOMEPAGE = (SIZE, SIZE, 1, 2), np.float32, "https://github.com/Ceyron/exponax"
    LABEL = tfds.features.Tensor(shape=SHAPE, dtype=np.float32, encoding="bytes")

    def splits(self):
        splits = {}
        for number, (split, count) in enumerate(TRAJECTORIES.items()):
            fields = np.concatenate([trajectories(AT_ONCE, [SEED, number, k]) for k in range(count // AT_ONCE)])
            before = fields[:, : STEPS : EVERY[split]]
            change = fields[:, 1 :: EVERY[split]] - before
            splits[split] = tuple(array.reshape(-1, *self.SHAPE) for array in (before, change))
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("exponax", "jax", "jaxlib"))
        digest = hashlib.sha256(b"".join(array.tobytes() for arrays in splits.values() for array in arrays)).hexdigest()
        return splits, {"note": f"simulated by {versions}", "source": versions, "content": f"sha256:{digest}", "seed": SEED}


def trajectories(count: int, seed) -> np.ndarray:
    """Velocities [count, STEPS + 1, SIZE, SIZE, 2] float32; the same for a seed, on one kind of processor."""
    try:
        import exponax
    except ImportError as error:
        raise DataError("the flow is simulated by exponax, which is not installed: pip install exponax") from error

    solver = exponax.stepper.NavierStokesVorticity(2, 2 * np.pi, FINE, STEP / SUBSTEPS, diffusivity=VISCOSITY, order=4)
    step = jax.vmap(exponax.RepeatedStepper(solver, SUBSTEPS))

    @jax.jit
    def run(w):
        w = jax.lax.fori_loop(0, WARM, lambda _, w: step(w), w)
        return jax.lax.scan(lambda w, _: (step(w), velocity(w[:, 0], jax.numpy)), w, length=STEPS + 1)[1]

    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        return np.asarray(run(start(count, seed)[:, None]), np.float32).swapaxes(0, 1)


def start(count: int, seed) -> np.ndarray:
    """Vorticities [count, FINE, FINE] float32."""
    noise = np.fft.rfft2(np.random.RandomState(seed).standard_normal((count, FINE, FINE)))
    w = np.fft.irfft2(noise * np.exp(-((np.hypot(*waves(FINE)) - 5) / 2) ** 2), s=(FINE, FINE))
    speed = np.sqrt((velocity(w) ** 2).sum(-1).mean((1, 2)))
    return (w / speed[:, None, None]).astype(np.float32)


def velocity(w, xp=np):
    """The velocity [n, SIZE, SIZE, 2] of vorticities [n, FINE, FINE], of the wave numbers below SIZE / 2 in each axis."""
    k, half = waves(FINE), SIZE // 2
    square = np.where(k[0] ** 2 + k[1] ** 2 == 0, 1, k[0] ** 2 + k[1] ** 2)
    low = (abs(k[0]) < half) & (k[1] < half)
    psi = -xp.fft.rfft2(w) * (low / square)
    u = xp.stack([1j * k[1] * psi, -1j * k[0] * psi], -1)[:, :, : half + 1]
    u = xp.concatenate([u[:, :half], u[:, -half:]], 1)
    return xp.fft.irfft2(u, s=(SIZE, SIZE), axes=(1, 2)) * (SIZE / FINE) ** 2


def waves(size: int):
    """The wave numbers [size, 1] and [1, size // 2 + 1] of the two axes of a real field."""
    return np.fft.fftfreq(size, 1 / size)[:, None], np.arange(size // 2 + 1.0)[None, :]
