"""Augmentation: the laws of turns, shifts and flips, and the moments of a train set."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.datasets import augment, rotation

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (3, 7, 7, 2), (1, 6, 9, 3)])
def test_a_turn_by_nothing_is_the_identity(shape):
    images = RNG.random(shape)
    np.testing.assert_array_equal(rotation.rotate(images, np.zeros(shape[0])), images)


@pytest.mark.parametrize("size", [28, 7])
@pytest.mark.parametrize("quarters", [1, 2, 3, 4, -1])
def test_quarter_turns_only_permute_pixels(size, quarters):
    images = RNG.random((3, size, size, 2))
    turned = rotation.rotate(images, np.full(3, quarters * np.pi / 2))
    np.testing.assert_allclose(turned, np.rot90(images, quarters, axes=(1, 2)), atol=1e-13)


def test_turning_a_plane_is_exact_away_from_the_border():
    row, column = np.mgrid[:15, :15] - 7.0
    angle = 0.4
    turned = rotation.rotate((2 * row - 3 * column)[None, ..., None], np.array([angle]))[0, ..., 0]
    expected = 2 * (np.cos(angle) * row + np.sin(angle) * column) - 3 * (np.cos(angle) * column - np.sin(angle) * row)
    inside = np.hypot(row, column) <= 7
    np.testing.assert_allclose(turned[inside], expected[inside], atol=1e-12)


def test_what_comes_from_outside_is_zero():
    turned = rotation.rotate(np.ones((1, 28, 28, 1)), np.array([np.pi / 4]))[0, ..., 0]
    assert turned[0, 0] == turned[0, -1] == turned[-1, 0] == turned[-1, -1] == 0
    assert turned[14, 14] == 1


def test_jax_turns_as_numpy_does():
    images, angles = RNG.random((50, 28, 28, 1)), RNG.uniform(0, 2 * np.pi, 50)
    turn = jax.jit(lambda images, angles: rotation.rotate(images, angles, jnp))
    turned = turn(images.astype(np.float32), angles.astype(np.float32))
    assert turned.dtype == jnp.float32
    np.testing.assert_allclose(turned, rotation.rotate(images, angles), atol=2e-5)


@pytest.mark.parametrize("function", [augment.rotate, functools.partial(augment.deform, linear=0, bend=0)])
@pytest.mark.parametrize("quarters", [0, 1, 2])
def test_quarter_turns_on_a_finer_grid_only_permute_pixels(quarters, function, monkeypatch):
    """A grid of three points per pixel and axis holds the pixels themselves, which cubic interpolation keeps."""
    images = RNG.random((3, 9, 9, 2), np.float32)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.full(shape, quarters * np.pi / 2))
    turned = function(jax.random.key(0), jnp.asarray(images), finer=3)
    np.testing.assert_allclose(turned, np.rot90(images, quarters, axes=(1, 2)), atol=1e-5)


@pytest.mark.parametrize(("linear", "bend"), [(0.1, 0), (0, 0.5)])
def test_deformations_are_as_large_as_they_say(linear, bend, monkeypatch):
    """What a slope of one a pixel reads: off by `linear` times the distance from the centre, and by `bend` at its points."""
    row, column = np.mgrid[:25, :25] - 12.0
    slope = np.broadcast_to(row[None, ..., None].astype(np.float32), (2000, 25, 25, 1))
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.zeros(shape))
    off = np.asarray(augment.deform(jax.random.key(0), jnp.asarray(slope), linear, bend))[..., 0] - row
    assert abs(off.mean(0)[12, 12]) < 0.05
    deviation = off.std(0)[5:20, 5:20]
    if linear:
        np.testing.assert_allclose(deviation, linear * np.hypot(row, column)[5:20, 5:20], rtol=0.1, atol=1e-4)
    else:
        assert 0.5 * bend < deviation.min() and 0.9 * bend < deviation.max() < 1.1 * bend


def test_a_finer_grid_blurs_less():
    """A wave of six pixels' length, turned by 45° and measured where the border does not reach."""
    row, column = np.mgrid[:41, :41] - 20.0
    angle = np.pi / 4
    wave = lambda x: np.cos(np.pi / 3 * x)[None, ..., None].astype(np.float32)  # noqa: E731
    expected = wave(np.cos(angle) * row + np.sin(angle) * column)
    inside = np.hypot(row, column) < 15
    fine = jax.image.resize(jnp.asarray(wave(row)), (1, 123, 123, 1), "cubic")
    coarse, fine = rotation.rotate(wave(row), np.array([angle])), rotation.rotate(fine, jnp.array([angle]), jnp, 3)
    errors = [np.abs(turned - expected)[0, inside].max() for turned in (coarse, fine)]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("function", [augment.rotate, functools.partial(augment.rotate, finer=2), augment.deform,
                                      augment.shift_and_flip])
def test_augmentation_depends_on_the_key_alone_and_differs_between_images(function):
    images = jnp.broadcast_to(RNG.random((1, 12, 12, 3), np.float32), (20, 12, 12, 3))
    once, again, other = (jax.jit(function)(jax.random.key(seed), images) for seed in (0, 0, 1))
    assert once.shape == images.shape and once.dtype == images.dtype
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)
    assert len(np.unique(np.asarray(once), axis=0)) > 10


def test_shift_and_flip_gives_crops_of_the_padded_image_and_its_mirror_and_all_of_them():
    pad, image = 1, RNG.random((4, 4, 2), np.float32)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    crops = [padded[i : i + 4, j : j + 4] for i, j in itertools.product(range(3), repeat=2)]
    possible = {crop.tobytes() for crop in crops} | {crop[:, ::-1].tobytes() for crop in crops}
    images = jnp.broadcast_to(image, (500, 4, 4, 2))
    seen = {out.tobytes() for out in np.asarray(augment.shift_and_flip(jax.random.key(0), images, pad))}
    assert len(possible) == 18 and seen == possible


def test_moments_of_volumes_are_one_number_a_channel():
    """A mean that varied over space would break the equivariance of all that follows."""
    volumes = np.random.default_rng(0).uniform(size=(5, 3, 4, 5, 2)).astype(np.float32)
    mean, std = augment.moments(volumes)
    np.testing.assert_allclose(mean, volumes.mean((0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, volumes.std((0, 1, 2, 3)), rtol=1e-5)


def test_moments_are_those_of_each_channel():
    images = RNG.random((1500, 5, 6, 3), np.float32)
    mean, std = augment.moments(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 1, 2), dtype=np.float64), rtol=1e-6)
