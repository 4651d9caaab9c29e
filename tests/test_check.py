"""What would fail later fails before compute, in one line, and leaves no run."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import Net, make_config, make_data

from experiments import check, losses, saved, train
from experiments.config import ConfigError, make, piecewise, warmup_cosine
from experiments.datasets import SPLITS, Split
from experiments.workdir import TrainError


class Raises(Net):
    def __call__(self, x, train):
        raise ZeroDivisionError("on purpose")


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


class Volume(Net):
    def __call__(self, x, train):
        return super().__call__(x.sum(4), train)


class Image2(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x)


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        self.variable("cache", "x", jnp.zeros, ())
        return nn.Dense(3)(x.reshape(len(x), -1))


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(10**9)(x.reshape(len(x), -1))
        return nn.Dense(3)(nn.Dense(10**9)(x))


class Text(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        nn.Dense(3)(x.reshape(len(x), -1))
        return "text"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": Raises()}, r"the network Raises on images \[10, 4, 4, 1\] fails: ZeroDivisionError: on purpose"),
        ({"network": NoTrain()}, "the network NoTrain on images .* fails: TypeError: .*train"),
        ({"network": Volume()}, "the network Volume on images .* fails: "),
        ({"network": Image2()}, r"gives float32\[10, 4, 4, 3\] for images .*; expected float logits \[10, 3\]"),
        ({"network": Text()}, "the network Text on images .* fails: TypeError"),
        ({"network": Wide()}, "the network Wide has 3.73e.09 GiB of parameters, and this machine .* give it fewer channels"),
        ({"network": Stateful()}, "has variables 'cache'; only params and batch_stats are kept"),
        ({"network": Net(num_classes=4)}, "the network has 4 classes, patterns has 3"),
        ({"augment": lambda key, x: x[:, 1:]}, r"augment gives float32\[16, 3, 4, 1\] for images float32\[16, 4, 4, 1\]"),
        ({"augment": lambda key, x: "text"}, "augment on images .* fails: TypeError: .* returned a value of type .*str"),
        ({"augment": lambda x: x}, "augment on images .* fails: TypeError"),
        ({"augment": lambda key, x: np.asarray(x)}, "augment on images .* fails: TracerArrayConversionError"),
        ({"optimizer": lambda rate: rate}, "optimizer gives .*; expected an optax transformation"),
        ({"optimizer": optax.adam(0.1).update}, "optimizer fails: TypeError"),
        ({"learning_rate": lambda epoch, epochs: "fast"}, "learning_rate fails: TypeError"),
        ({"learning_rate": lambda epoch, epochs: jnp.ones(2)}, r"learning_rate gives float32\[2\]; expected one number"),
        ({"learning_rate": lambda epoch, epochs: 1 / 0}, "learning_rate fails: ZeroDivisionError"),
        ({"learning_rate": lambda epoch, epochs: 1.0 - epoch}, "learning_rate is -.* at epoch 1.*; it must be finite and"),
        ({"learning_rate": lambda epoch, epochs: 0.0 * epoch}, "learning_rate is 0 over all of the run"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0 at epoch 0"),
        (
            {"learning_rate": partial(piecewise, {1: 0.1})},
            "piecewise takes .* rising epochs, the first of them 0, got {1: 0.1}",
        ),
        ({"learning_rate": partial(piecewise, {0: 1, 9: 2, 5: 3})}, "piecewise takes .* rising epochs"),
        ({"learning_rate": partial(piecewise, {})}, "piecewise takes"),
        ({"learning_rate": partial(warmup_cosine, 0.1, 0)}, "a warm-up of more than 0 epochs, got 0"),
        ({"batch_size": 71}, "batch_size is 71; the train set has 70 images only"),
        ({"moments": lambda images: 3}, "moments fails: TypeError"),
        ({"moments": lambda images: ("a", "b")}, "moments fails: ValueError"),
        ({"moments": lambda images: (0.5, np.ones(2))}, "moments fails: ValueError"),
        ({"moments": lambda images: (np.nan, 1)}, "moments gives the mean .nan. .* expected finite numbers"),
        ({"moments": lambda images: (0.5, 0)}, "deviation .0.. of channels; .*leave out a channel that is the same everywhere"),
        ({"metrics": {"loss": losses.ERROR}}, "metrics has the name 'loss'; expected words such as mean_iou"),
        ({"metrics": {1: losses.ERROR}}, "metrics has the name 1; expected"),
        ({"metrics": {"error": losses.averaged(losses.cross_entropy)}}, "the metric error is the share that is"),
    ],
)
def test_what_would_fail_later_fails_before_compute_and_leaves_no_run(tmp_path, changes, message):
    with pytest.raises((TrainError, ConfigError), match=message) as caught:
        train.train(make_config(**changes), tmp_path / "run", make_data())
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def split(images, labels):
    return Split(np.asarray(images), np.asarray(labels))


GOOD = make_data().train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": split(GOOD.images, GOOD.labels + 1)}, "labels from 1 to 3; with 3 classes they must lie in 0 … 2"),
        ({"test": split(GOOD.images, GOOD.labels - 1)}, "the test set of patterns has labels from -1"),
        ({"train": split(GOOD.images, GOOD.labels.astype(float))}, "labels of type float64; give whole numbers from 0 to 2"),
        ({"train": split(GOOD.images, GOOD.labels[:-1])}, r"images \(70, 4, 4, 1\) and labels \(69,\)"),
        ({"train": split(GOOD.images.astype(int), GOOD.labels)}, "images of type int64; give bytes .* or floats in"),
        ({"train": split(GOOD.images * np.nan, GOOD.labels)}, "numbers that are not finite"),
        ({"test": split(GOOD.images[:0], GOOD.labels[:0])}, "the test set of patterns is empty"),
        ({"test": split(GOOD.images[:, 1:], GOOD.labels)}, "several shapes"),
        ({"train": split([["x"]], [0])}, "expected .n, .space, channels"),
        ({"train": split(0 * GOOD.images, GOOD.labels)}, "deviation .0.. of channels; .*a channel that is the same everywhere"),
        ({"num_classes": 0}, "num_classes 0; expected a whole number of at least 1"),
    ],
)
def test_data_that_cannot_be_trained_on_are_named(tmp_path, changes, message):
    with pytest.raises(TrainError, match=message):
        train.train(make_config(), tmp_path / "run", make_data()._replace(**changes))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: 1 / 0, "the function dataset fails: ZeroDivisionError"),
        (lambda name: name, "the function dataset fails: TypeError"),
        (lambda: None, "the function dataset gives None; expected a datasets.Dataset"),
        (lambda: make_data()._replace(test=None), "the function dataset gives the test set None; expected a data.*Split"),
    ],
)
def test_a_function_that_gives_no_data_is_named(tmp_path, function, message):
    with pytest.raises(TrainError, match=message):
        train.train(make_config(dataset=function), tmp_path / "run")


def test_bytes_are_trained_on_and_predicted_in_one_range(tmp_path):
    """uint8 images count as value / 255, as a picture that is asked for does; other ranges are not asked for pictures."""
    data = make_data()
    as_bytes = {
        name: split(np.round(getattr(data, name).images * 255).astype(np.uint8), getattr(data, name).labels)
        for name in SPLITS
    }
    checked = check.data(data._replace(**as_bytes))
    assert checked.train.images.dtype == np.float32 and checked.train.images.max() <= 1
    np.testing.assert_array_equal(checked.test.images, as_bytes["test"].images / np.float32(255))
    wide = {name: split(3 * getattr(data, name).images - 1, getattr(data, name).labels) for name in SPLITS}
    train.train(make_config(epochs=1), tmp_path / "run", data._replace(**wide))
    with pytest.raises(TrainError, match="trained on numbers from -.*, and a picture has 0 to 1"):
        saved.predict(tmp_path / "run", ["any.png"])


@pytest.mark.parametrize("values", [{"seed": 2**32}, {"eval_batch_size": 2**40}, {"epochs": 10**12}, {"batch_size": 2**33}])
def test_sizes_and_seeds_are_bounded(values):
    with pytest.raises(ConfigError, match="it must be at most 4294967295"):
        make({"network": Net()} | values)


def test_a_huge_evaluation_batch_takes_no_more_than_the_split(tmp_path):
    config = make_config(epochs=1, eval_batch_size=10**9)
    assert train.train(config, tmp_path / "run", make_data())["images"]["test"] == 33
