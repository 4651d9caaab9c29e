"""Volumes generated from analytic shapes: the eight tetracubes, smoothed, scaled, shifted, turned and with noise.

A synthetic task, for networks in three dimensions. A tetracube is four equal cubes joined face to face; all eight have the
same volume, and the left and the right screw are mirror images, so that neither the volume nor any feature that reflections
keep tells the classes apart. With the signed distance d of the union of the cubes, evaluated at turned coordinates (no array
is ever interpolated), the voxel at x holds

    clip(1 / (1 + exp(d(R^{-1}(x - s)) / SOFTNESS)) + noise, 0, 1),      x in [-1, 1]^3 on SIZE points along each axis.
"""

import numpy as np

CELLS = {
    "I": [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)],
    "O": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)],
    "L": [(0, 0, 0), (1, 0, 0), (2, 0, 0), (2, 1, 0)],
    "T": [(0, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0)],
    "S": [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0)],
    "tripod": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)],
    "right screw": [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)],
    "left screw": [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, -1)],
}
SIZE = 17  # points along an axis; odd, so that strides of 2 keep the centre
SOFTNESS = 0.06  # half a voxel
SIDE = 0.36, 0.44  # of a cube, uniform
SHIFT = 0.06  # largest, along each axis, uniform
NOISE = 0.1  # standard deviation
TILT = 30  # degrees, the largest in training
IMAGES = {"train": 2000, "test": 1000}
NOTE = "generated from analytic shapes (tetracubes), not measured data; {} in training, test turned at random by any angle"


def generate(turned: bool = False, seed: int = 0, sizes=IMAGES):
    """({"train": (volumes, labels), "test": …}, note), the same on every call; the classes take turns.

    The test shapes are turned uniformly over SO(3); those for training are tilted, by an angle uniform up to TILT about an
    axis of any direction, or turned too.

    Returns:
      volumes float32 [n, SIZE, SIZE, SIZE, 1] in [0, 1], labels int32 [n].
    """
    splits = {}
    for number, (split, n) in enumerate(sizes.items()):
        random = np.random.default_rng([seed, number])
        labels = np.arange(n, dtype=np.int32) % len(CELLS)
        rotations = random_rotations(random, n, None if turned or split == "test" else np.radians(TILT))
        sides, shifts = random.uniform(*SIDE, n), random.uniform(-SHIFT, SHIFT, (n, 3))
        names = list(CELLS)
        volumes = np.stack([volume(names[k], r, a, s) for k, r, a, s in zip(labels, rotations, sides, shifts, strict=True)])
        volumes += NOISE * random.standard_normal(volumes.shape, np.float32)
        splits[split] = volumes.clip(0, 1)[..., None], labels
    return splits, NOTE.format("turned at random" if turned else f"tilted by up to {TILT}°")


def volume(name: str, rotation=None, side: float = 0.4, shift=(0.0, 0.0, 0.0)) -> np.ndarray:
    """The smoothed occupancy [SIZE, SIZE, SIZE] float32 of one tetracube, turned about its centre of mass, then shifted."""
    rotation = np.eye(3) if rotation is None else rotation
    axis = np.linspace(-1, 1, SIZE)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1) - np.asarray(shift)
    points = (points @ rotation).astype(np.float32)  # R^{-1} x, as rows
    cells = np.array(CELLS[name], np.float32)
    distance = np.full(points.shape[:-1], np.inf, np.float32)
    for centre in (cells - cells.mean(0)) * np.float32(side):
        beyond = np.abs(points - centre) - np.float32(side / 2)
        outside = np.sqrt((np.maximum(beyond, 0) ** 2).sum(-1))
        distance = np.minimum(distance, outside + np.minimum(beyond.max(-1), 0))
    return 1 / (1 + np.exp(distance / np.float32(SOFTNESS)))


def random_rotations(random: np.random.Generator, n: int, largest: float | None = None) -> np.ndarray:
    """[n, 3, 3], uniform over SO(3), or about axes of any direction by angles uniform up to ``largest`` (radians).

    From unit quaternions (w, v): R = (w² - |v|²) 1 + 2 v vᵀ + 2 w [v]_×.
    """
    q = random.standard_normal((n, 4))
    w, v = np.split(q / np.linalg.norm(q, axis=1, keepdims=True), [1], axis=1)
    if largest is not None:
        half = random.uniform(0, largest / 2, (n, 1))
        w, v = np.cos(half), np.sin(half) * v / np.linalg.norm(v, axis=1, keepdims=True)
    cross = np.cross(v[:, None], -np.eye(3))  # rows e_i × v
    return ((w**2 - (v**2).sum(1, keepdims=True))[..., None] * np.eye(3) + 2 * v[:, :, None] * v[:, None]
            + 2 * w[..., None] * cross)
