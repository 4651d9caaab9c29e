"""Augmentations, as pure functions of (key, images) to be traced into the training step, and moments of a data set."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import pdo_jax as pdo

from . import rotation


def rotate(key: jax.Array, images: jax.Array, finer: int = 1) -> jax.Array:
    """Turns each image [n, H, W, C] by its own angle, uniform in [0°, 360°): bilinear, zero outside.

    With `finer` > 1 the image is first brought to a grid of so many points per pixel and axis by cubic interpolation, and read
    bilinearly there, which blurs it less.
    """
    n, height, width, channels = images.shape
    angles = jax.random.uniform(key, (n,), maxval=2 * jnp.pi)
    if finer > 1:
        images = jax.image.resize(images, (n, finer * height, finer * width, channels), "cubic")
    return rotation.rotate(images, angles, jnp, finer)


def deform(key: jax.Array, images: jax.Array, linear: float = 0.1, bend: float = 0.5, finer: int = 1) -> jax.Array:
    """Turns each image as `rotate` does, and deforms it: pixel p of the result is read at A R p + s(p), p from the centre.

    R turns, A is the identity plus normal numbers of deviation `linear`, and s is cubic between 4×4 points, where it is normal,
    of deviation `bend` pixels. Bilinear, zero outside, on a `finer` grid as in `rotate`.
    """
    n, height, width, channels = images.shape
    turn_key, linear_key, bend_key = jax.random.split(key, 3)
    angles = jax.random.uniform(turn_key, (n,), maxval=2 * jnp.pi)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turns = jnp.stack([cos, sin, -sin, cos], -1).reshape(n, 2, 2)
    matrices = (jnp.eye(2) + linear * jax.random.normal(linear_key, (n, 2, 2))) @ turns
    centre = (np.array([height, width]) - 1) / 2
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1) - centre
    shifts = jax.image.resize(jax.random.normal(bend_key, (n, 4, 4, 2)), (n, height, width, 2), "cubic")
    at = jnp.einsum("nij,xyj->nxyi", matrices, grid.astype(np.float32)) + centre.astype(np.float32) + bend * shifts
    if finer > 1:
        images = jax.image.resize(images, (n, finer * height, finer * width, channels), "cubic")
        at = finer * at + (finer - 1) / 2
    return rotation.read(images, at[..., 0], at[..., 1], jnp)


def shift_and_flip(key: jax.Array, images: jax.Array, pad: int = 4) -> jax.Array:
    """Pads each image [n, H, W, C] with `pad` zeros a side, crops [H, W] at random, mirrors it with probability 1/2."""
    n, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(crop_key, (n, 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    crop = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (height, width, channels)))
    flip = jax.random.bernoulli(flip_key, shape=(n, 1, 1, 1))
    cropped = crop(padded, corners)
    return jnp.where(flip, cropped[:, :, ::-1], cropped)


def turn(key: jax.Array, images: jax.Array, targets: jax.Array, *, in_rep=None, out_rep=None, group=None):
    """Images and targets turned together, each pair by an element, drawn at random, of those of the group that keep the grid.

    Args:
      images, targets: fields [n, *space, channels, d] of `in_rep` and `out_rep`; without one, images [n, *space, channels] or
        classes [n, *space].
      group: by default that of `in_rep`.
    """
    group = group or in_rep.group
    elements = np.flatnonzero(group.preserves_grid)
    drawn = jax.random.randint(key, (len(images),), 0, len(elements)), jnp.arange(len(images))

    def turned(x, rep):
        act = functools.partial(pdo.fields.act, x, rep) if rep else lambda e: pdo.groups.transform(x, group.elements[e])
        return jnp.stack([act(element) for element in elements])[drawn]

    return turned(images, in_rep), turned(targets, out_rep)


def disturb(key: jax.Array, images: jax.Array, targets: jax.Array, deviation: float):
    """White noise on the images, which the targets, their change over a step, take back: a network that learns it corrects
    small errors of its own, step after step."""
    noise = deviation * jax.random.normal(key, images.shape, images.dtype)
    return images + noise, targets - noise


def in_turn(key: jax.Array, images: jax.Array, targets: jax.Array, functions: Sequence[Callable]):
    """What several augmentations of images and targets make of them, one after another."""
    for function, own in zip(functions, jax.random.split(key, len(functions)), strict=True):
        images, targets = function(own, images, targets)
    return images, targets


def scale(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean 0 and the root mean square of all channels, each [C]: moments of fields, whose zero and direction mean something."""
    deviation = np.sqrt(np.mean(np.square(images), dtype=np.float64))
    return np.zeros(images.shape[-1], np.float32), np.full(images.shape[-1], deviation, np.float32)


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float32 [C], of each channel of images [n, *space, C]: for `(images - mean) / std`.

    Computed once, outside the training step, by numpy: float32 cannot add up a whole data set.
    """
    total = squares = 0
    axes = tuple(range(images.ndim - 1))
    for start in range(0, len(images), 1000):
        part = images[start : start + 1000].astype(np.float64)
        total, squares = total + part.sum(axes), squares + (part**2).sum(axes)
    count = images[..., 0].size
    mean = total / count
    return mean.astype(np.float32), np.sqrt(squares / count - mean**2).astype(np.float32)
