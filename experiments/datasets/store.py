"""Prepared data sets: made once into a folder, then read back into memory as arrays."""

import contextlib
import difflib
import errno
import fcntl
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import own, shapes3d, stream
from .sources import DataError, known_features, path_of

SUBSET = Path(__file__).with_name("mnist_rot_subset.npz")
PREPARING = ".preparing-"
CLASSES = {
    "mnist_rot/subset": 10,
    "mnist_rot/official": 10,
    "mnist_rot/regenerated": 10,
    "cifar10": 10,
    "cifar100": 100,
    "shapes3d": 8,
    "shapes3d/turned": 8,
    "flow/4": None,
    "flow/16": None,
    "flow/64": None,
}


class Split(NamedTuple):
    images: np.ndarray | stream.Images  # float32 in [0, 1], [n, H, W, C]; or other fields [n, *space, …]
    labels: np.ndarray  # int32, [n], or [n, *space] of every pixel; or float32, [n, …]


SPLITS = ("train", "validation", "test")


class Dataset(NamedTuple):
    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int | None  # None where the labels are numbers
    note: str  # provenance
    classes: tuple[str, ...] = ()  # their names, if they have any


def load(name: str, *, validation: int = 0, data_dir: str | os.PathLike | None = None,
         image_size: int | None = None, streamed: bool | str = False) -> Dataset:
    """Reads a data set into memory, or what streams it; the first time it is fetched and prepared, with progress bars.

    Args:
      name: "mnist_rot/subset" (embedded, needs no network), "mnist_rot/official", "mnist_rot/regenerated", "cifar10",
        "cifar100", "shapes3d" and "shapes3d/turned" (generated, volumes [n, D, H, W, C]; see `shapes3d`), "flow/4", "flow/16"
        and "flow/64" (simulated, velocities [n, 64, 64, 1, 2] and their changes, of so many trajectories; see `flow`); or data
        of your own, "folder:PATH", "npz:PATH", "tfds:NAME[/config][:split]", see `own`.
      validation: how many examples, from the end of the train split, to set apart; 0 trains on all of it.
      data_dir: where prepared sets lie, and in its folder `manual` the archives put there by hand. Default: the
        environment variable PDO_DATA_DIR, or ~/.cache/pdo_jax; for tfds: that of tensorflow-datasets.
      image_size: height and width that pictures of your own are brought to.
      streamed: whether pictures of your own stay where they are until they are asked for; "auto": if they would take more
        than a quarter of the memory.

    Raises:
      ValueError: an unknown name, or a bad count of validation examples.
      DataError: the set can be neither read nor fetched; nothing half-written is left behind.
    """
    kind, colon, _ = str(name).partition(":")
    if colon and kind in own.KINDS:
        splits, classes, note = own.load(name, image_size, data_dir, streamed)
        splits = {split: _split(*splits[split]) if split in splits else None for split in SPLITS}
        train = splits["train"]
        empty = Split(train.images[:0], train.labels[:0])
        given = Dataset(name, train, splits["validation"] or empty, splits["test"], len(classes), note, classes)
        return hold_out(given, validation)
    if image_size is not None:
        raise ValueError(f"image_size is for pictures of your own (folder:PATH, tfds:NAME); {name} has its size")
    if name not in CLASSES:
        close = difflib.get_close_matches(str(name), CLASSES, n=1, cutoff=0.3)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown data set {name!r}; the data sets are {', '.join(CLASSES)}, "
                         f"folder:PATH, npz:PATH and tfds:NAME.{hint}")
    if name == "mnist_rot/subset":
        with np.load(SUBSET) as arrays:
            splits = {split: (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test")}
        note = "an embedded subset of MNIST-rot regenerated from MNIST, not the official file"
    elif name.startswith("shapes3d"):
        splits, note = shapes3d.generate(turned=name == "shapes3d/turned")
    else:
        root = path_of(data_dir or os.environ.get("PDO_DATA_DIR") or "~/.cache/pdo_jax")
        splits, note = _read(_prepared("flow" if name.startswith("flow/") else name, root))
        if name.startswith("flow/"):
            pairs = int(name.partition("/")[2]) * len(splits["train"][0]) // 64
            splits["train"] = tuple(array[:pairs] for array in splits["train"])
    train, test = _split(*splits["train"]), _split(*splits["test"])
    empty = Split(train.images[:0], train.labels[:0])
    return hold_out(Dataset(name, train, empty, test, CLASSES[name], note), validation)


def hold_out(given: Dataset, validation: int) -> Dataset:
    """The data set with so many validation examples from the end of its train split."""
    n = len(given.train.labels)
    if isinstance(validation, bool) or not isinstance(validation, int) or not 0 <= validation < n:
        raise ValueError(f"validation must be a whole number from 0 to {n - 1} for {given.name}, got {validation!r}; give "
                         "another in a config or with --set validation=…")
    if not validation:
        return given
    if len(given.validation.labels):
        raise ValueError(f"{given.name} has a validation set of its own, of {len(given.validation.labels)}; set validation=0")
    held, train = (Split(*(a[part] for a in given.train)) for part in (slice(n - validation, n), slice(n - validation)))
    return given._replace(train=train, validation=held)


def _prepared(name: str, root: Path) -> Path:
    """The folder of the prepared data set; made in a temporary folder beside it, and moved there when complete."""
    import tensorflow_datasets as tfds

    from . import builders, flow

    kind, _, config = name.partition("/")
    builder = {"mnist_rot": builders.MnistRot, "cifar10": builders.Cifar10, "cifar100": builders.Cifar100,
               "flow": flow.Flow}[kind]
    target = root / name / str(builder.VERSION)
    if target.exists():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root), tempfile.TemporaryDirectory(prefix=PREPARING, dir=root) as folder:
            if target.exists():  # another process has made it meanwhile
                return target
            build = builder(manual_dir=root / "manual", data_dir=folder, config=config or None)
            tfds.disable_progress_bar()  # ours are shorter; nor should the temporary folder be printed
            with contextlib.redirect_stdout(io.StringIO()):
                build.download_and_prepare()
            _read(build.data_path)  # proves that all of it has reached the disk
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(build.data_path).rename(target)
    except DataError:
        raise
    except (OSError, RuntimeError) as error:  # the record writer reports a full disk as a RuntimeError
        full = os.strerror(errno.ENOSPC) in str(error)
        advice = "free some space, or" if full else "check that this folder can be written, or"
        message = f"cannot write the data set {name} under {root}: {error}\n{advice} choose another with PDO_DATA_DIR"
        raise DataError(message) from error
    return target


@contextlib.contextmanager
def _alone(root: Path):
    """One process prepares at a time, so that what lies about of others is of killed ones, and can go."""
    with (root / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares data in {root}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        for left in root.glob(PREPARING + "*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _read(folder: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str]:
    """The images and labels of each split as they were stored, and the note on their provenance."""
    import tensorflow_datasets as tfds

    splits = {}
    try:
        known_features(folder)
        builder = tfds.builder_from_directory(folder)
        for split in ("train", "test"):
            source = builder.as_data_source(split)
            examples = source.__getitems__(range(len(source)))
            splits[split] = tuple(np.stack([example[key] for example in examples]) for key in ("image", "label"))
        return splits, builder.info.metadata["note"]
    except Exception as error:  # the reader's errors are of many kinds
        raise DataError(f"the data set in {folder} is damaged ({error}); delete that folder and try again") from error


def _split(images: np.ndarray | stream.Images, labels: np.ndarray) -> Split:
    if isinstance(images, stream.Images):
        return Split(images, labels)
    floats = images.astype(np.float32)
    if images.dtype == np.uint8:
        floats /= 255
    return Split(floats, labels if labels.dtype == np.float32 else labels.astype(np.int32))
