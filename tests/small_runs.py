"""Small runs for tests: a network, data, a config, and the command line in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from experiments import programs
from experiments.config import Config, piecewise
from experiments.datasets import Dataset, Split
from experiments.workdir import restore, saved_epochs

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """A small network with all that training has to carry: weights, a bias, batch statistics and dropout."""

    num_classes: int = 3
    dropout: float = 0.0
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(8, use_bias=False, dtype=self.dtype)(x.reshape(len(x), -1))
        x = nn.BatchNorm(not train, momentum=0.8, dtype=self.dtype, axis_name=self.axis_name)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)


def shift(key, images):
    """An augmentation: a random change of brightness for each image."""
    return images + 0.1 * jax.random.normal(key, (len(images), 1, 1, 1))


def make_data(channels: int = 1) -> Dataset:
    """Three noisy patterns of 4×4 pixels; sizes that are no multiple of any batch."""
    rng = np.random.default_rng(7)
    patterns = rng.random((3, 4, 4, channels))

    def split(n):
        labels = rng.integers(0, 3, n)
        images = 0.5 * patterns[labels] + 0.5 * rng.random((n, 4, 4, channels))
        return Split(images.astype(np.float32), labels.astype(np.int32))

    return Dataset("patterns", split(70), split(15), split(33), 3, "made by a test")


def make_config(**changes) -> Config:
    rates = partial(piecewise, {0: 1e-2, 1: 3e-3})
    return Config(
        **dict(network=Net(), epochs=3, batch_size=16, learning_rate=rates, l2=1e-2, eval_batch_size=10) | changes
    )


def from_folder(folder: Path | str, **changes) -> Config:
    """A config on a folder of pictures for each of three classes, with all that is random."""
    options = dict(network=Net(dropout=0.3), augment=shift, dataset=f"folder:{folder}", image_size=4, validation=6,
                   batch_size=2)
    return make_config(**options | changes)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def final_state(workdir: Path, config: Config):
    fresh = programs.initial_state(config, programs.make_model(config, [0], [1]), (4, 4, 1))
    return restore(workdir, max(saved_epochs(workdir)), fresh)


def write_config(path: Path, network: str, **others: str) -> Path:
    """A config file of a small network on 500 digits; the values are Python."""
    values = {"dataset": "'mnist_rot/subset'", "validation": "5500", "eval_batch_size": "512"} | others
    text = ", ".join(f"{key}={value}" for key, value in values.items())
    path.write_text(
        "from small_runs import Net, make_config, shift\n"
        f"config = vars(make_config()) | dict(network=Net(num_classes=10, {network}), {text})\n"
    )
    return path


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """Of a process with so many CPU devices, that imports what the tests do. The cache is its own, for it may be killed."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu",
                         "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def start(config_file: Path, workdir: Path) -> subprocess.Popen:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "experiments.main", "--config", str(config_file), "--workdir", str(workdir)]
    return subprocess.Popen(command, env=environment(config_file.parent / "cache"), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen):
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output


def kill(process: subprocess.Popen):
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def wait_for(condition, process: subprocess.Popen):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "the job ended before it could be killed"
        time.sleep(0.002)
