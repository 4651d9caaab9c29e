"""A saved run: its test error, and what it takes a picture for.

A run is data: its network is built from names of this library and of packages that are imported already, and no file that it
names is executed. Only a config file that the caller names is.
"""

import stat
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from PIL import Image, ImageOps, UnidentifiedImageError

from experiments import check, datasets, losses, programs, record, train
from experiments.config import Config, ConfigError, describe
from experiments.workdir import TrainError, restore, saved_epochs
from pdo_jax import architecture, networks, weights

PICTURES = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # formats whose readers run no other program
LARGEST = 50_000_000  # pixels of a picture


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


def evaluate(path: str | Path, config: Config | None = None, data: datasets.Dataset | None = None) -> dict:
    """The test error of a run, after its last epoch or after that of a checkpoint, see `load`; or of one of PRETRAINED.

    The test set must be the one of the run. `data` stands in for a data set that was handed to `train.train`.
    """
    if str(path) in networks.PRETRAINED and not Path(path).exists():
        return evaluate_pretrained(str(path))
    run = load(path, config)
    if data is None and run.about["input"]["own"]:
        raise TrainError(f"{path} was trained on arrays that were handed over, not on a data set with a name; hand them over "
                         "here too: saved.evaluate(run, data=...)")
    data = check.data(data or train.load_data(run.config))
    there, here = run.about["record"]["data"], record.data_of(data)
    if there.get("test") != here["test"]:
        raise TrainError(f"the test set of {data.name} here is not that of the run {path}; bring back the data of the run")
    return {"epoch": run.epoch, **test_error(run.config, run.model, run.variables, data)}


def evaluate_pretrained(name: str) -> dict:
    """The test error of a network of `pdo_jax.networks.PRETRAINED`."""
    network, variables = networks.load_pretrained(name)
    config = Config(network, dataset=networks.PRETRAINED[name].data)
    model = programs.Model(network, np.float32(0), np.float32(1))  # it normalises its images itself
    return {"epoch": None, **test_error(config, model, variables, check.data(train.load_data(config)))}


def test_error(config: Config, model: programs.Model, variables, data: datasets.Dataset) -> dict:
    mesh = programs.all_devices()
    numbers, _ = programs.evaluation_program(config, model, mesh)(programs.place(mesh, variables), data.test)
    return {f"test_{name}": value for name, value in numbers.items()} | {"dataset": data.name}


def export(path: str | Path, file: str | Path, config: Config | None = None):
    """Writes the network of a run or checkpoint, behind the normalisation of its images, for `pdo_jax.export.load`."""
    run = load(path, config)
    mean, deviation = (tuple(np.ravel(moment).tolist()) for moment in (run.model.mean, run.model.deviation))
    network = networks.Normalised(run.config.network, mean, deviation)
    weights.save(file, network, {name: {"inner": tree} for name, tree in jax.device_get(run.variables).items()})


def predict(path: str | Path, image: str | Path, config: Config | None = None) -> np.ndarray:
    """The probability of each class for an image file, brought to the size and the channels of the run's data set."""
    run = load(path, config)
    if len(run.shape) != 3:
        raise TrainError(f"{path} takes volumes {list(run.shape)}, not pictures; ask it in Python, with saved.load")
    low, high = run.about["input"]["range"]
    if low < 0 or high > 1:
        raise TrainError(f"{path} was trained on numbers from {low:g} to {high:g}, and a picture has 0 to 1; ask it in Python, "
                         "with saved.load")
    pixels = read_picture(Path(image), run.shape)
    return np.asarray(jax.nn.softmax(run.model.outputs(run.variables, pixels[None], train=False)[0].astype(np.float32)))


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
    epoch = int(path.name) if path.parent.name == "checkpoints" and path.name.isdigit() else max(epochs, default=0)
    if epoch not in epochs:
        raise TrainError(f"{workdir} has no checkpoint {epoch or ''}; it has those of the epochs {epochs}")
    here = SingleDeviceSharding(jax.local_devices()[0])
    wanted = {"average": variables} if config.ema else variables
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), wanted)
    read = restore(workdir, epoch, wanted)
    return Run(config, model, read["average"] if config.ema else read, epoch, about)


def config_of(saved: dict, workdir: Path, given: Config | None) -> Config:
    """What a record says of evaluation, the network and plain values; or the config that is given, if it is the same."""
    if given:
        parts = {key: saved[key] for key in ("config", "network")}
        grave, _ = record.differences(parts, record.config_of(given))
        if grave:
            raise TrainError(f"{workdir} holds a run of another config. They differ in\n  " + "\n  ".join(grave))
        return given
    plain = {key: saved["config"][key] for key in ("dataset", "validation", "dtype", "ema", "eval_batch_size", "parallel")
             if key in saved["config"]}
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


def read_picture(path: Path, shape) -> np.ndarray:
    """[height, width, channels] float32 in [0, 1] of an image file, as `shape` says.

    Raises:
      TrainError: no plain file of a known format; more pixels than `LARGEST`, or a mode that has no one meaning here.
    """
    height, width, channels = shape
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise TrainError(f"cannot read the image {path}: it is no file, but a folder, a pipe or a device")
        with Image.open(path, formats=PICTURES) as picture:
            if picture.width * picture.height > LARGEST:
                raise Image.DecompressionBombError
            if getattr(picture, "n_frames", 1) != 1:
                raise TrainError(f"{path} holds {picture.n_frames} pictures; give a file with one")
            planes = _planes(ImageOps.exif_transpose(picture), channels, path)
    except TrainError:
        raise
    except Image.DecompressionBombError:
        raise TrainError(f"{path} has more than {LARGEST:,} pixels; give a smaller one") from None
    except UnidentifiedImageError as error:
        raise TrainError(f"{path} is not an image file that can be read; give a PNG or JPEG") from error
    except OSError as error:
        raise TrainError(f"cannot read the image {path}: {error.strerror or error}") from error
    except Exception as error:  # what readers of formats raise on damaged files
        raise TrainError(f"cannot read the image {path}: {type(error).__name__}: {str(error)[:200]}") from error
    planes = [plane.resize((width, height), Image.Resampling.BOX) for plane in planes]  # the mean of pixels that fall together
    return np.stack([np.asarray(plane, np.float32) for plane in planes], -1)


def _planes(picture, channels, path):
    """A picture of mode F with values in [0, 1] for each channel."""
    if "A" in picture.getbands() or "transparency" in picture.info:
        if picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise TrainError(f"{path} is transparent in parts, and what lies behind them is not known; save it without alpha")
    if picture.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(picture, np.float32) / (1 if picture.mode == "F" else 65535)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise TrainError(f"{path} has numbers outside 0 … {1 if picture.mode == 'F' else 65535}; bring them into it")
        bands = [values] * channels
    elif picture.mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        raise TrainError(f"{path} is a picture in {picture.mode}; save it in RGB or grey")
    else:
        if "A" in picture.getbands() or picture.mode == "P":
            picture = picture.convert("RGB")
        bytes_ = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.float32) / 255
        bands = np.moveaxis(bytes_.reshape(*bytes_.shape[:2], channels), -1, 0)
    return [Image.fromarray(np.ascontiguousarray(band)) for band in bands]
