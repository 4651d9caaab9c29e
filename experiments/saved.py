"""A saved run: its test error, and what it takes a picture for.

A run is data: its network is built from names of this library and of packages that are imported already, and no file that it
names is executed. Only a config file that the caller names is.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from experiments import check, datasets, losses, measures, programs, record
from experiments.config import Config, ConfigError, describe
from experiments.datasets import DataError, pictures
from experiments.workdir import TrainError, restore, saved_epochs
from pdo_jax import architecture, networks, weights

ANGLES = 500  # test images that are turned


class Run(NamedTuple):
    """A network of a run after an epoch."""

    config: Config
    model: programs.Model
    variables: Any
    epoch: int
    about: dict  # what config.json says

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image."""
        return tuple(self.about["input"]["shape"])

    def probabilities(self):
        """A compiled function of images that gives those of the classes."""
        return jax.jit(lambda x: jax.nn.softmax(self.model.outputs(self.variables, x, train=False).astype(np.float32)))


def evaluate(path: str | Path, config: Config | None = None, data: datasets.Dataset | None = None) -> dict:
    """The test error of a run, after its last epoch or after that of a checkpoint, see `load`; or of one of PRETRAINED.

    The test set must be the one of the run. `data` stands in for a data set that was handed to `train.train`.
    """
    if str(path) in networks.PRETRAINED and not Path(path).exists():
        return evaluate_pretrained(str(path))
    run = load(path, config)
    return {"epoch": run.epoch, **test_error(run.config, run.model, run.variables, data_of(run, path, data))}


def data_of(run: Run, path: str | Path, data: datasets.Dataset | None = None) -> datasets.Dataset:
    """The data set of a run, or the one that is handed over, if its test set is that of the run."""
    if data is None and run.about["input"]["own"] and not callable(run.config.dataset):
        raise TrainError(f"{path} was trained on arrays that were handed over or made by a function, not on a data set with a "
                         "name; name the config file with --config, or hand them over: saved.evaluate(run, data=...)")
    data = check.data(data or check.load(run.config))
    if run.about["record"]["data"].get("test") != record.data_of(data)["test"]:
        raise TrainError(f"the test set of {data.name} here is not that of the run {path}; bring back the data of the run")
    return data


def evaluate_pretrained(name: str) -> dict:
    """The test error of a network of `pdo_jax.networks.PRETRAINED`."""
    network, variables = networks.load_pretrained(name)
    config = Config(network, dataset=networks.PRETRAINED[name].data, eval_batch_size=64)  # near to a CPU's cores
    model = programs.Model(network, np.float32(0), np.float32(1))  # it normalises its images itself
    return {"epoch": None, **test_error(config, model, variables, check.data(check.load(config)))}


def test_error(config: Config, model: programs.Model, variables, data: datasets.Dataset) -> dict:
    mesh = programs.all_devices()
    numbers, totals = programs.evaluation_program(config, model, mesh)(programs.place(mesh, variables), data.test)
    images, labels = np.asarray(data.test.images[:ANGLES]), data.test.labels[:ANGLES]
    found = {f"test_{name}": value for name, value in numbers.items()} | {"dataset": data.name, "images": len(data.test.labels)}
    if labels.ndim > 1 or "error" not in totals:
        return found
    confusion = totals["error"]
    n, wrong = int(confusion.sum()), int(confusion.sum() - np.trace(confusion))
    found |= {"interval": measures.interval(wrong, n), "confusion": confusion.tolist(),
              "classes": names(data.classes, confusion)}
    if images.ndim == 4:
        turned = measures.logits_at_angles(model, variables, images)
        found["images_turned"] = len(labels)
        found["accuracy_at_angles"] = (turned.argmax(-1) == labels).mean(1).tolist()
    return found


def names(given, classes: Sized) -> list[str]:
    """Of the classes: those that are given, if they fit, else their numbers."""
    fit = isinstance(given, list | tuple) and len(given) == len(classes) and all(isinstance(name, str) for name in given)
    return list(given) if fit else list(map(str, range(len(classes))))


def export(path: str | Path, file: str | Path, config: Config | None = None):
    """Writes the network of a run or checkpoint, behind the normalisation of its images, for `pdo_jax.export.load`."""
    run = load(path, config)
    mean, deviation = (tuple(np.ravel(moment).tolist()) for moment in (run.model.mean, run.model.deviation))
    network = networks.Normalised(run.config.network, mean, deviation)
    weights.save(file, network, {name: {"inner": tree} for name, tree in jax.device_get(run.variables).items()})


def predict(path: str | Path, files: Iterable[str | Path], config: Config | None = None,
            batch: int = 64) -> tuple[list[str], Iterator[tuple[Path, np.ndarray | DataError]]]:
    """The names of the classes, and for each image file its class probabilities [classes], or what is wrong with it.

    Pictures are brought to the size and the channels of the run's data set; folders stand for all that is in them. `files` may
    be a stream: results come as soon as `batch` pictures are there.
    """
    run = load(path, config)
    if len(run.shape) != 3:
        raise TrainError(f"{path} takes volumes {list(run.shape)}, not pictures; ask it in Python, with saved.load")
    low, high = run.about["input"]["range"]
    if low < 0 or high > 1:
        raise TrainError(f"{path} was trained on numbers from {low:g} to {high:g}, and a picture has 0 to 1; ask it in Python, "
                         "with saved.load")
    probabilities = run.probabilities()
    _, *classes = jax.eval_shape(probabilities, jax.ShapeDtypeStruct((1, *run.shape), np.float32)).shape
    if len(classes) != 1:
        raise TrainError(f"{path} gives {classes} numbers for a picture, and no class; ask it in Python, with saved.load")
    return names(run.about["input"].get("classes"), np.empty(classes)), _predictions(probabilities, run.shape, files, batch)


def _predictions(probabilities, shape, files, batch):
    paths = (inside for file in files for inside in pictures.files(Path(file)))
    while some := list(itertools.islice(paths, batch)):
        read = pictures.try_each(some, lambda path: pictures.read(path, shape))
        whole = [pixels for pixels in read if not isinstance(pixels, DataError)]
        padded = np.zeros((1 if len(some) == 1 else batch, *shape), np.float32)  # two sizes, so that two programs serve all
        padded[: len(whole)] = whole if whole else 0
        found = iter(np.asarray(probabilities(padded))) if whole else iter(())
        yield from ((path, pixels if isinstance(pixels, DataError) else next(found))
                    for path, pixels in zip(some, read, strict=True))


def load(path: str | Path, config: Config | None = None) -> Run:
    """The run at the last epoch in a workdir, or at one checkpoint folder in it.

    `config` is needed only for a network that is not in this library, nor in a module that this program has imported.

    Raises:
      TrainError: what is there is damaged, or of another config.
    """
    path = Path(path).absolute()
    workdir = next((folder for folder in (path, *path.parents[:2]) if (folder / "config.json").exists()), None)
    if workdir is None:
        raise TrainError(f"{path} is no folder of a run, nor a checkpoint in one: there is no config.json")
    about = record.read_config(workdir)
    inputs, config = about["input"], config_of(about["record"], workdir, config)
    try:
        model = programs.make_model(config, inputs["mean"], inputs["deviation"])
        variables = jax.eval_shape(lambda: programs.new_variables(model, jax.random.key(0), inputs["shape"]))
    except Exception as error:
        raise TrainError(f"the network of {workdir} cannot be built: {type(error).__name__}: {str(error)[:300]}") from error
    epochs = saved_epochs(workdir)
    epoch = path.name if path.parent.name == "checkpoints" else str(max(epochs, default=""))
    if epoch not in map(str, epochs):
        raise TrainError(f"{workdir} has no checkpoint {epoch}; it has those of the epochs {epochs}")
    epoch = int(epoch)
    here = SingleDeviceSharding(jax.local_devices()[0])
    wanted = {"average": variables} if config.ema else variables
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), wanted)
    read = restore(workdir, epoch, wanted)
    return Run(config, model, read["average"] if config.ema else read, epoch, about)


def config_of(saved: dict, workdir: Path, given: Config | None) -> Config:
    """What a record says of evaluation, the network and plain values; or the config that is given, if it is the same."""
    streamed = bool(saved["data"].get("streamed"))  # as it was, whatever "auto" would do here
    if given:
        parts = {key: saved[key] for key in ("config", "network")}
        grave, _ = record.differences(parts, record.config_of(given))
        if grave:
            raise TrainError(f"{workdir} holds a run of another config. They differ in\n  " + "\n  ".join(grave))
        return dataclasses.replace(given, stream=streamed)
    plain = {key: saved["config"][key] for key in ("dataset", "validation", "dtype", "ema", "eval_batch_size", "parallel",
                                                       "image_size")
             if key in saved["config"]}
    plain["stream"] = streamed
    folder = saved["config"].get("data_dir")
    if isinstance(folder, str) and isinstance(plain.get("dataset"), str) and Path(folder, plain["dataset"]).is_dir():
        plain["data_dir"] = folder  # read there, but never prepared where a file from someone else says so
    usual = {"loss": describe(losses.cross_entropy), "metrics": describe({"error": losses.ERROR})}
    try:
        if any(saved["config"].get(key, function) != function for key, function in usual.items()):
            raise ConfigError("its loss or metrics are functions of its own")
        return Config(network=architecture.from_data(saved["network"]), **plain)
    except (ValueError, ConfigError) as error:
        raise TrainError(f"the run in {workdir} cannot be built from its config.json alone: {error}\nIf you trust the config "
                         "file that it was made with, name it: --config FILE") from error
