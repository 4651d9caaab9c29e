"""A saved run: its test error, and what it takes a picture for."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from PIL import Image, UnidentifiedImageError

from experiments import train
from experiments.config import Config
from experiments.config import load as load_config
from experiments.workdir import TrainError, check_same, read_json, restore, saved_epochs


def evaluate(path: str | Path, config: Config | None = None) -> dict:
    """The test error of a run, after its last epoch or after that of a checkpoint; see `load`."""
    config, model, variables, epoch, _ = load(path, config)
    data = train.load_data(config)
    mesh = Mesh(jax.devices(), ("data",))
    evaluate_split = train.evaluation_program(config, model, data.num_classes, mesh)
    confusion, loss = evaluate_split(train.place(mesh, variables), data.test)
    return {"epoch": epoch, "test_error": train.error_rate(confusion), "test_loss": loss, "dataset": data.name}


def predict(path: str | Path, image: str | Path, config: Config | None = None) -> np.ndarray:
    """The probability of each class for an image file, brought to the size and the channels of the run's data set."""
    _, model, variables, _, (height, width, channels) = load(path, config)
    try:
        with Image.open(image) as picture:
            picture = picture.convert("L" if channels == 1 else "RGB")
            picture = picture.resize((width, height), Image.Resampling.BOX)  # the mean of the pixels that fall together
    except UnidentifiedImageError as error:
        raise TrainError(f"{image} is not an image file that can be read; give a PNG or JPEG") from error
    except OSError as error:
        raise TrainError(f"cannot read the image {image}: {error.strerror or error}") from error
    pixels = np.asarray(picture, np.float32).reshape(1, height, width, channels) / 255
    return np.asarray(jax.nn.softmax(model.logits(variables, pixels, train=False)[0].astype(np.float32)))


def load(path: str | Path, config: Config | None = None):
    """(config, model, variables, epoch, image shape) of the last epoch in a workdir, or of one checkpoint folder in it.

    Without `config`, the file that the run was started with is read again.
    """
    path = Path(path).absolute()
    workdir = next((folder for folder in (path, *path.parents[:2]) if (folder / "config.json").exists()), None)
    if workdir is None:
        raise TrainError(f"{path} is no folder of a run, nor a checkpoint in one: there is no config.json")
    saved = read_json(workdir / "config.json")
    if config is None and not saved["source"]:
        raise TrainError(f"{workdir} does not say which config file it was made with; give --config")
    config = config or load_config(saved["source"]["file"], saved["source"]["overrides"])
    check_same(config, workdir)
    inputs = saved["input"]
    model = train.make_model(config, inputs["mean"], inputs["deviation"])
    epochs = saved_epochs(workdir)
    epoch = int(path.name) if path.parent.name == "checkpoints" and path.name.isdigit() else max(epochs, default=0)
    if epoch not in epochs:
        raise TrainError(f"{workdir} has no checkpoint {epoch or ''}; it has those of the epochs {epochs}")
    shapes = jax.eval_shape(lambda: train.new_state(config, model, inputs["shape"]))
    here = SingleDeviceSharding(jax.local_devices()[0])
    state = restore(workdir, epoch, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes))
    return config, model, state.variables, epoch, inputs["shape"]
