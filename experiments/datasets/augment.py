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
