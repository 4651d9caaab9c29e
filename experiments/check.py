"""One check before compute: data, network, augmentation, optimiser and schedule are tried on shapes alone.

What would fail in the first step, in the evaluation after the last one or in what is drawn then, fails here, in a line.
"""

import contextlib
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import datasets, programs
from experiments.config import Config, ConfigError
from experiments.datasets import SPLITS, Dataset, Split, hold_out, stream
from experiments.datasets.pictures import memory
from experiments.losses import ERROR
from experiments.workdir import TrainError


def data(given: Dataset) -> Dataset:
    """The data set with images float32, bytes brought to [0, 1], and targets int32 or float32; an error for what cannot be
    trained on."""
    classes = given.num_classes
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int | np.integer) or classes < 1):
        raise TrainError(f"{given.name} has num_classes {classes!r}; expected a whole number of at least 1, or None where the "
                         "targets are numbers")
    splits = {name: _split(given, name) for name in SPLITS}
    for name in ("train", "test"):
        if not len(splits[name].labels):
            raise TrainError(f"the {name} set of {given.name} is empty; it needs at least one image")
    for part in Split._fields:
        shapes = {name: getattr(split, part).shape[1:] for name, split in splits.items() if len(split.labels)}
        if len(set(shapes.values())) > 1:
            raise TrainError(f"the {part} of {given.name} have several shapes: {shapes}; all splits need the same one")
    return given._replace(**splits)


def _split(given, name):
    images, labels = getattr(given, name)
    streamed, labels = isinstance(images, stream.Images), np.asarray(labels)
    images = images if streamed else np.asarray(images)
    where = f"the {name} set of {given.name}"
    fits = labels.shape[:1] == images.shape[:1] if given.num_classes is None else (
        0 < labels.ndim < images.ndim and labels.shape == images.shape[: labels.ndim])
    if images.ndim < 3 or not fits or 0 in images.shape[1:] + labels.shape[1:]:
        raise TrainError(f"{where} has images {images.shape} and labels {labels.shape}; expected [n, *space, channels] and "
                         "[n], or [n, *space] for a class of each pixel")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise TrainError(f"{where} has images of type {images.dtype}; give bytes (uint8, 0 … 255) or floats in [0, 1]")
    floats = images if streamed else (
        images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32, copy=False))
    finite = streamed or np.isfinite(floats).all()  # `stream.verify` looks at what is streamed
    if given.num_classes is None:
        numbers = labels.astype(np.float32, copy=False) if labels.dtype.kind in "fiu" else np.full(1, np.nan)
        if not (finite and np.isfinite(numbers).all()):
            raise TrainError(f"{where} has images or targets that are not finite numbers; look for NaN or infinity in it")
        return Split(floats, numbers)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TrainError(f"{where} has labels of type {labels.dtype}; give whole numbers from 0 to {given.num_classes - 1}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < given.num_classes:
        raise TrainError(f"{where} has labels from {labels.min()} to {labels.max()}; with {given.num_classes} classes they "
                         f"must lie in 0 … {given.num_classes - 1}")
    if not finite:
        raise TrainError(f"{where} has images with numbers that are not finite; look for NaN or infinity in it")
    return Split(floats, labels.astype(np.int32, copy=False))


def moments(config: Config, images) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the train images, [channels], by which all are normalised."""
    with _trying("moments"):
        mean, deviation = (np.broadcast_to(np.float32(part), images.shape[-1:]) for part in config.moments(images))
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation > 1e-6 * np.abs(mean)).all()):
        raise TrainError(f"moments gives the mean {mean} and the deviation {deviation} of channels; expected finite numbers "
                         "and deviations above 0: leave out a channel that is the same everywhere, or set moments")
    return mean, deviation


def load(config: Config) -> Dataset:
    """The data set of a config."""
    try:
        if callable(config.dataset):
            return _made(config.dataset, config.validation)
        return datasets.load(config.dataset, validation=config.validation, data_dir=config.data_dir,
                             image_size=config.image_size, streamed=config.stream)
    except ValueError as error:
        raise TrainError(str(error)) from error


def _made(function, validation):
    """The data set that a function gives, with so many examples held out."""
    with _trying("the function dataset"):
        given = function()
    if not isinstance(given, Dataset):
        raise TrainError(f"the function dataset gives {given!r:.100}; expected a datasets.Dataset")
    for name in SPLITS:
        if not isinstance(found := getattr(given, name), Split):
            raise TrainError(f"the function dataset gives the {name} set {found!r:.100}; expected a datasets.Split")
    return hold_out(given, validation)


def run(config: Config, model, given: Dataset, mesh: Mesh):
    """Traces all that will be computed, on shapes; nothing is compiled."""
    network, devices, streamed = config.network, mesh.size, isinstance(given.train.images, stream.Images)
    if config.stream is True and not streamed:
        raise TrainError(f"{given.name} is arrays in memory, which cannot be streamed; stream is for folder:PATH, tfds:NAME, "
                         "and functions that give datasets.stream.Images")
    if streamed and config.scan is True:
        raise TrainError(f"{given.name} is streamed, and scan=True needs all of it on the devices; leave scan out, or set "
                         "stream=False")
    count, shape, name = len(given.train.labels), given.train.images.shape[1:], type(network).__name__
    if given.num_classes and getattr(network, "num_classes", given.num_classes) != given.num_classes:
        raise TrainError(f"the network has {network.num_classes} classes, {given.name} has {given.num_classes}; give it as "
                         f"many, in a config or with --set network.num_classes={given.num_classes}")
    if config.batch_size % devices:
        raise TrainError(f"batch_size is {config.batch_size}; it must be a multiple of the {devices} devices")
    if config.batch_size > count:
        raise TrainError(f"batch_size is {config.batch_size}; the train set has {count} images only")

    evaluated = -(-min(config.eval_batch_size, max(512, len(given.test.labels))) // devices)
    images, targets = (jax.ShapeDtypeStruct((evaluated, *array.shape[1:]), array.dtype) for array in given.train)
    with _trying(f"the network {name} on images {list(images.shape)}"):
        variables = jax.eval_shape(lambda: programs.new_variables(model, jax.random.key(0), shape))
        if not jax.tree.leaves(variables.get("params")):
            raise TrainError(f"the network {name} has no parameters to train")
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
        if 2 * size > memory():  # with its gradient
            raise TrainError(f"the network {name} has {size / 2**30:.3g} GiB of parameters, and this machine "
                             f"{memory() / 2**30:.0f} GiB of memory; give it fewer channels")
        unknown = sorted(variables.keys() - {"params", "batch_stats"})
        if unknown:
            raise TrainError(f"the network {name} has variables {unknown[0]!r}; only params and batch_stats are kept")
        outputs = jax.eval_shape(lambda v, x: model.outputs(v, x, train=False), variables, images)
        expected = (*targets.shape, *([given.num_classes] if given.num_classes else []))
        if getattr(outputs, "shape", None) != expected or not jnp.issubdtype(outputs.dtype, jnp.floating):
            raise TrainError(f"the network {name} gives {_kind(outputs)} for images {list(images.shape)}; expected float "
                             f"{'logits' if given.num_classes else 'numbers'} {list(expected)}")
    if config.augment:
        batch = [jax.ShapeDtypeStruct((config.batch_size // devices, *array.shape[1:]), array.dtype) for array in given.train]
        with _trying(f"augment on images {list(batch[0].shape)}"):
            arrays = batch if targets.ndim > 1 else batch[:1]
            changed = jax.eval_shape(config.augment, jax.random.key(0), *arrays)
            if targets.ndim > 1 and not (isinstance(changed, tuple | list) and len(changed) == 2):
                raise TrainError(f"augment gives {_kind(changed)}; expected images and targets")
            for found, array in zip(changed if targets.ndim > 1 else [changed], arrays, strict=True):
                if getattr(found, "shape", None) != array.shape or jnp.issubdtype(found.dtype, jnp.floating) != jnp.issubdtype(
                        array.dtype, jnp.floating):
                    raise TrainError(f"augment gives {_kind(found)} for images {_kind(array)}; expected the same")
    if config.label_smoothing and not given.num_classes:
        raise TrainError(f"label_smoothing is for classes, and {given.name} has none; leave it out")
    with _trying("loss"):
        outputs = jax.ShapeDtypeStruct(outputs.shape, jnp.float32)
        losses = jax.eval_shape(config.loss, outputs, targets)
        if getattr(losses, "shape", None) != images.shape[:1] or not jnp.issubdtype(losses.dtype, jnp.floating):
            raise TrainError(f"loss gives {_kind(losses)}; expected a float for each example, {list(images.shape[:1])}")
    if wrong := [name for name in config.metrics if not (isinstance(name, str) and name.isidentifier()) or name == "loss"]:
        raise TrainError(f"metrics has the name {wrong[0]!r}; expected words such as mean_iou, and not loss, which is told too")
    if config.metrics.get("error", ERROR) != ERROR:
        raise TrainError("the metric error is the share that is predicted wrong, losses.ERROR; give another one another name")
    with _trying("metrics"):
        counted = jax.ShapeDtypeStruct(images.shape[:1], bool)
        totals = jax.eval_shape(lambda *arrays: programs.tallies(config, *arrays), outputs, targets, counted)
        programs.numbers(config, jax.tree.map(lambda a: np.ones(a.shape, a.dtype), totals))
    with _trying("learning_rate"):
        _rates(config, count // config.batch_size)
    with _trying("optimizer"):
        optimiser = programs.make_optimiser(config, 1)
        if not isinstance(optimiser, optax.GradientTransformation):
            raise TrainError(f"optimizer gives {optimiser!r:.100}; expected an optax transformation, as optax.adam does")
    if config.start is not None:
        with _trying("start"):
            first = programs.make_model(config.first(), model.mean, model.deviation)
            jax.eval_shape(lambda: programs.started_state(
                config, model, images.shape[1:], programs.new_variables(first, jax.random.key(0), images.shape[1:])))
    with _trying("a step of training"):
        state = jax.eval_shape(lambda variables: programs.state_of(config, variables), variables)
        step = programs.step_function(config, model, count // config.batch_size, devices)
        rows = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
        split = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in given.train]
        new, _ = jax.eval_shape(programs.mapped(step, "jit", mesh), state, *split, rows)
    with _trying("a step of training, in which network and optimiser must keep the shapes and types of their state,"):
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def _rates(config, steps):
    """Rates are tried at up to a thousand moments of the run."""
    moments = np.linspace(0, config.epochs, min(1000, config.epochs * steps + 1), dtype=np.float32)
    rates = jax.eval_shape(lambda: programs.rate(config, jnp.float32(0)))
    if rates.shape != () or not jnp.issubdtype(rates.dtype, jnp.floating):
        raise TrainError(f"learning_rate gives {_kind(rates)}; expected one number for an epoch")
    rates = np.asarray(jax.jit(jax.vmap(lambda epoch: programs.rate(config, epoch)))(moments))
    wrong = ~(np.isfinite(rates) & (rates >= 0))
    if wrong.any():
        raise TrainError(f"learning_rate is {rates[wrong][0]} at epoch {moments[wrong][0]:g}; it must be finite and at least 0")
    if not rates.any():
        raise TrainError("learning_rate is 0 over all of the run, so that nothing would be learned")


@contextlib.contextmanager
def _trying(what: str) -> Iterator[None]:
    try:
        yield
    except (TrainError, ConfigError):
        raise
    except Exception as error:  # whatever a user's function raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        raise TrainError(f"{what} fails: {type(error).__name__}: {' '.join(lines)[:400]}") from error


def _kind(value) -> str:
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else f"{value!r:.100}"
