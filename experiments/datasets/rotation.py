"""Turning images about their centre: one formula, for numpy (the data builder) and jax.numpy (the augmentation)."""

import numpy as np


def rotate(images, angles, xp=np, finer=1):
    """Turns each image counter-clockwise, as displayed with row 0 on top, by its own angle.

    `out(p) = in(R(-angle) p)` with p measured from the image centre ((H - 1) / 2, (W - 1) / 2), interpolated
    bilinearly; every pixel outside the image counts as zero.

    Args:
      images: [n, H, W, C], floating.
      angles: [n], radians.
      xp: the array module that computes: `numpy` or `jax.numpy`.
      finer: the images are given on a grid of so many points per pixel and axis; what is returned has one for each pixel.

    Returns:
      [n, H / finer, W / finer, C] of the dtype of `images`.
    """
    n, height, width, channels = images.shape
    row = finer * (xp.arange(height // finer)[:, None] - (height // finer - 1) / 2)
    column = finer * (xp.arange(width // finer)[None, :] - (width // finer - 1) / 2)
    cos, sin = xp.cos(angles)[:, None, None], xp.sin(angles)[:, None, None]
    return read(images, cos * row + sin * column + (height - 1) / 2, cos * column - sin * row + (width - 1) / 2, xp)


def read(images, row, column, xp=np):
    """Bilinear values at the positions `row`, `column` [n, h, w], in pixels from the first one; zero outside: [n, h, w, C]."""
    n, height, width, channels = images.shape

    # A border of zeros, one pixel wide, stands for all that lies outside; coordinates below count from its corner.
    padded = xp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(n, -1, channels)
    i, down = _cell(row, height, xp)
    j, right = _cell(column, width, xp)

    def corner(di, dj):
        index = ((i + di) * (width + 2) + j + dj).reshape(n, -1, 1)
        return xp.take_along_axis(padded, index, axis=1).reshape(n, *i.shape[1:], channels)

    top = (1 - right) * corner(0, 0) + right * corner(0, 1)
    bottom = (1 - right) * corner(1, 0) + right * corner(1, 1)
    return ((1 - down) * top + down * bottom).astype(images.dtype)


def _cell(coordinate, size, xp):
    """The index of the pixel before `coordinate`, counted from the zero border, and the fraction [..., 1] past it."""
    coordinate = xp.clip(coordinate, -1, size) + 1
    index = xp.clip(xp.floor(coordinate), 0, size)
    return index.astype(xp.int32), (coordinate - index)[..., None]
