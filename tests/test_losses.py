"""Losses and metrics against plain formulas, and the training loop on classes of pixels and on fields."""

import json
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_runs import flat

import pdo_jax as pdo
from experiments import losses, programs, saved, train
from experiments.config import Config, ConfigError
from experiments.datasets import Dataset, Split, augment
from experiments.workdir import TrainError, restore, saved_epochs

P4M = pdo.groups.dihedral(4)
VECTOR, SCALAR = pdo.fields.standard(P4M), pdo.fields.determinant(P4M)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_losses_are_their_formulas():
    """A number for each example, by loops over examples, pixels and classes."""
    logits, labels = random(3, 4, 5, 2), np.random.default_rng(1).integers(0, 2, (3, 4, 5))
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for k in range(3):
        entropy = np.mean([-np.log(q[k, i, j, labels[k, i, j]]) for i in range(4) for j in range(5)])
        sides = [((q[k, ..., c] * (labels[k] == c)).sum(), q[k, ..., c].sum(), (labels[k] == c).sum()) for c in range(2)]
        overlap = np.mean([1 - (2 * both + 1) / (one + other + 1) for both, one, other in sides])
        np.testing.assert_allclose(losses.cross_entropy(logits, labels)[k], entropy, rtol=1e-5)
        np.testing.assert_allclose(losses.dice(logits, labels)[k], overlap, rtol=1e-5)
        np.testing.assert_allclose(losses.segmentation(logits, labels)[k], entropy + overlap, rtol=1e-5)
        distance = np.linalg.norm(logits[k] - q[k]) / np.linalg.norm(q[k])
        np.testing.assert_allclose(losses.relative_l2(logits, q)[k], distance, rtol=1e-5)
    perfect = 100.0 * jax.nn.one_hot(labels, 2)
    assert losses.segmentation(perfect, labels).max() < 1e-3 and losses.relative_l2(q, q).max() == 0


def test_metrics_add_up_over_what_counts():
    """Mean IoU and means over all examples are those of all examples together, in whatever batches, padded or not."""
    logits, labels = random(6, 3, 3, 3), np.random.default_rng(1).integers(0, 2, (6, 3, 3))  # class 2 is never there
    logits[..., 2] = -9.0
    found = logits.argmax(-1)
    iou = np.mean([((found == c) & (labels == c)).sum() / ((found == c) | (labels == c)).sum() for c in range(2)])
    for metric, expected in ((losses.MEAN_IOU, iou), (losses.ERROR, (found != labels).mean()),
                             (losses.averaged(losses.dice), losses.dice(logits, labels).mean())):
        parts = [metric.tally(logits[rows], labels[rows], np.array(counted)) for rows, counted in (
            ([0, 1, 2, 3], [True] * 4), ([4, 5, 0, 0], [True, True, False, False]))]
        total = jax.tree.map(lambda *values: np.sum(values, 0), *parts)
        np.testing.assert_allclose(metric.value(total), expected, rtol=1e-6)


def test_noise_is_taken_back_by_the_targets():
    """And augmentations in turn are each given a key of their own."""
    images, targets = moving(4, 0)
    noise = partial(augment.disturb, deviation=0.1)
    x, y = noise(jax.random.key(0), images, targets)
    np.testing.assert_allclose(x + y, images + targets, atol=1e-6)
    assert 0.08 < (x - images).std() < 0.12
    x, _ = augment.in_turn(jax.random.key(0), images, targets, (noise, noise))
    assert 0.12 < (x - images).std() < 0.16


def pixels(n, seed):
    """Images of noise, and where they are bright."""
    images = random(n, 6, 6, 1, seed=seed)
    return Split(images, (images[..., 0] > 0.3).astype(np.int32))


def moving(n, seed):
    """Random vectors, and what turns with them: the gradient of their divergence, with wrapped differences."""
    images = random(n, 6, 6, 1, 2, seed=seed)
    shift = lambda x, by, axis: np.roll(x, -by, axis)
    slope = lambda x, axis: shift(x, 1, axis) - shift(x, -1, axis)
    divergence = slope(images[..., 0], 1) + slope(images[..., 1], 2)
    return Split(images, np.stack([slope(divergence, 1), slope(divergence, 2)], -1))


def dataset(make, classes):
    return Dataset("dense", make(32, 1), make(9, 2), make(13, 3), classes, "made by a test")


def config(**changes):
    return Config(**dict(epochs=2, batch_size=8, learning_rate=1e-2, eval_batch_size=10) | changes)


class Pixels(nn.Module):
    group: pdo.groups.Group = P4M

    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(2)(pdo.group_pool(nn.relu(pdo.LiftingConv(1, self.group, kernel_size=3)(x)), self.group))


class Vectors(nn.Module):
    group: pdo.groups.Group = P4M
    in_rep: pdo.fields.Representation = VECTOR
    out: pdo.fields.Representation = VECTOR

    @nn.compact
    def __call__(self, x, train: bool):
        return pdo.PDOConv(1, self.in_rep, self.out, padding="CIRCULAR")(x)


SEGMENTATION = dict(network=Pixels(), loss=losses.segmentation,
                    metrics={"error": losses.ERROR, "mean_iou": losses.MEAN_IOU})
FIELDS = dict(network=Vectors(), loss=losses.relative_l2, parallel="pmap",
              metrics={}, moments=augment.scale, augment=partial(augment.turn, in_rep=VECTOR, out_rep=VECTOR))


@pytest.mark.parametrize(("changes", "make", "classes"), [(SEGMENTATION, pixels, 2), (FIELDS, moving, None)],
                         ids=["segmentation", "fields"])
def test_a_run_on_dense_targets(tmp_path, changes, make, classes):
    """It learns, tells its metrics, draws no confusion matrix, goes on to the same bits, and is evaluated to the same again."""
    data, straight = dataset(make, classes), config(**changes)
    result = train.train(straight, tmp_path / "straight", data)
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert max(result["equivariance_error"].values()) < 1e-4
    assert not any("confusion" in figure for figure in result["figures"])
    for name in ("loss", *straight.metrics):
        assert {f"train_{name}", f"validation_{name}"} <= lines[0].keys() and result[f"test_{name}"] >= 0
    short = config(**changes | {"epochs": 1})
    train.train(short, tmp_path / "stopped", data)
    (tmp_path / "stopped" / "result.json").unlink()
    train.train(straight, tmp_path / "stopped", data, force=True)
    model = programs.make_model(straight, *straight.moments(data.train.images))
    fresh = programs.initial_state(straight, model, data.train.images.shape[1:])
    ends = [restore(tmp_path / name, max(saved_epochs(tmp_path / name)), fresh) for name in ("straight", "stopped")]
    np.testing.assert_array_equal(*map(flat, ends))
    again = saved.evaluate(tmp_path / "straight", straight, data)
    assert {name: again[name] for name in again if name.startswith("test_")} == {
        name: result[name] for name in result if name.startswith("test_")}
    with pytest.raises(TrainError, match="its loss or metrics are functions"):
        saved.evaluate(tmp_path / "straight", data=data)


def test_augmentation_turns_fields_and_targets_together():
    """A pair stays a pair: what turns with the group is the same function of turned inputs, and all elements are drawn."""
    images, targets = moving(64, 0)
    x, y = jax.jit(partial(augment.turn, in_rep=VECTOR, out_rep=VECTOR))(jax.random.key(0), images, targets)
    every = [np.stack([pdo.fields.act(field, VECTOR, e) for e in range(8)]) for field in (images, targets)]
    fits = np.abs(every[0] - x).max((2, 3, 4, 5)) < 1e-5  # [element, example]
    assert (fits.sum(0) == 1).all() and fits.any(1).all()
    np.testing.assert_allclose(y, every[1][fits.argmax(0), range(64)], atol=1e-5)
    vorticity, maps = random(8, 4, 4, 1, 1), np.arange(128, dtype=np.int32).reshape(8, 4, 4)
    x, y = augment.turn(jax.random.key(1), vorticity, maps, in_rep=SCALAR)
    fits = np.array([(pdo.groups.transform(maps, matrix) == y).all((1, 2)) for matrix in P4M.elements])
    assert (fits.sum(0) == 1).all() and y.dtype == maps.dtype
    every = np.stack([pdo.fields.act(vorticity, SCALAR, e) for e in range(8)])
    np.testing.assert_allclose(x, every[fits.argmax(0), range(8)], atol=1e-6)


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(2)(x.reshape(len(x), -1))


@pytest.mark.parametrize(("changes", "make", "classes", "message"), [
    (SEGMENTATION | {"network": Flat()}, pixels, 2, r"gives float32\[10, 2\] .*; expected float logits \[10, 6, 6, 2\]"),
    (FIELDS | {"network": Flat()}, moving, None, r"expected float numbers \[10, 6, 6, 1, 2\]"),
    (FIELDS | {"loss": lambda outputs, targets: 0.0}, moving, None, r"loss gives .*; expected a float for each .*, \[10\]"),
    (FIELDS | {"label_smoothing": 0.1}, moving, None, "label_smoothing is for classes"),
    (FIELDS | {"metrics": {"error": losses.ERROR}}, moving, None, "metrics fails"),
    (FIELDS | {"augment": lambda key, x: x}, moving, None, "augment .* fails: TypeError"),
    (FIELDS | {"augment": lambda key, x, y: x}, moving, None, "augment gives .*; expected images and targets"),
    (SEGMENTATION, lambda n, seed: Split(pixels(n, seed).images, np.zeros((n, 6, 5), int)), 2, "for a class of each pixel"),
    (FIELDS, lambda n, seed: Split(moving(n, seed).images, np.full((n, 6, 6, 1, 2), np.nan)), None, "not finite"),
])
def test_what_does_not_fit_is_named_before_compute(tmp_path, changes, make, classes, message):
    with pytest.raises((TrainError, ConfigError), match=message):
        train.train(config(**changes), tmp_path / "run", dataset(make, classes))
