"""Data sets of your own: a folder of pictures, an npz file, or what tensorflow-datasets has, without TensorFlow.

Pictures of a folder and of tensorflow-datasets may be streamed instead of held in memory, see `stream`.

"folder:PATH"   a folder of pictures for each class, in PATH or in PATH/train, PATH/test and perhaps PATH/validation. Of any
                size, which `image_size` brings to one; grey if all of them are, else in colour.
"npz:PATH"      arrays train_images, train_labels, test_images, test_labels, perhaps validation_images and validation_labels; or
                images and labels. Images [n, *space, channels], bytes or floats in [0, 1]; labels are whole numbers from 0.
"tfds:NAME"     NAME[/config][:split] of tensorflow-datasets, from its folder or prepared there; it needs an image and a label.

Without a test set a fifth of each class is set apart as one, the same at every start. The train set is shuffled once.
"""

import re
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import pictures, stream
from .sources import DataError, known_features, path_of

FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
Splits = dict[str, tuple[np.ndarray | stream.Images, np.ndarray]]


def load(name: str, image_size: int | None, data_dir: str | None, streamed: bool | str) -> tuple[Splits, tuple[str, ...], str]:
    """The splits, images and labels each, the names of the classes, and a note on where they come from.

    `streamed`: True, False or "auto", which streams what would take more than a quarter of the memory.

    Raises:
      DataError: what cannot be read, all bad files by name; labels that are none, classes without an image.
    """
    kind, _, place = name.partition(":")
    splits, classes, note = KINDS[kind](place, image_size, data_dir, streamed)
    for split, (images, labels) in splits.items():
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1] or labels.size and labels.min() < 0:
            raise DataError(f"the {split} labels of {name} are {labels.dtype}{list(labels.shape)} for images "
                            f"{list(images.shape)}; expected a whole number from 0 for each image")
    classes = classes or tuple(map(str, range(1 + max(max(labels, default=0) for _, labels in splits.values()))))
    counts = np.bincount(splits["train"][1], minlength=len(classes))
    needed = 1 if "test" in splits else 2
    if few := [repr(word) for word, count in zip(classes, counts, strict=True) if count < needed]:
        raise DataError(f"{len(few)} of the {len(classes)} classes of {name} have fewer than {needed} training images: "
                        f"{', '.join(few[:10])}; give them some, or leave those classes out")
    images, labels = splits["train"]
    order = np.random.default_rng(0).permutation(len(labels))
    if "test" not in splits:
        rank = np.empty(len(labels), int)  # of each image among those of its class, in this order
        for k in range(len(classes)):
            members = order[labels[order] == k]
            rank[members] = np.arange(len(members))
        held = rank < -(-counts // 5)[labels]
        splits["test"] = images[held], labels[held]
        order = order[~held[order]]
        note += ", a fifth of each class set apart for the test"
    splits["train"] = images[order], labels[order]
    return splits, classes, note


def _folder(place, size, _, streamed):
    root = path_of(place)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give one that holds a folder of pictures for each class")
    parts = {split: found[0] for split, names in FOLDERS.items() if (found := [root / n for n in names if (root / n).is_dir()])}
    if "train" not in parts:
        parts = {"train": root}
    elif "test" not in parts and len(parts) > 1:
        raise DataError(f"{root} has folders {', '.join(parts)} but no test; add it, or leave {root}/train alone")
    classes = tuple(sorted(folder.name for folder in _inside(parts["train"]) if folder.is_dir()))
    if not classes:
        raise DataError(f"{parts['train']} holds no folders; expected a folder of pictures for each class")
    files = {}
    for split, folder in parts.items():
        if unknown := sorted({inside.name for inside in _inside(folder)} - set(classes)):
            raise DataError(f"{folder} holds {unknown[0]!r}, which is no folder of a class of {parts['train']}; remove it")
        files[split] = [(path, label) for label, name in enumerate(classes)
                        for path in pictures.files(folder / name)]
    paths = [path for found in files.values() for path, _ in found]
    if not paths:
        raise DataError(f"the folders in {parts['train']} hold no pictures")
    shape, start, splits = pictures.shape_of_all(paths, size, str(root)), 0, {}
    if stream.wanted(streamed, len(paths), shape):
        images = stream.Images(stream.Files(root, paths, shape), np.arange(len(paths)))
    else:
        images = pictures.read_all(paths, shape, str(root))
    for split, found in files.items():
        splits[split] = images[start : start + len(found)], np.array([label for _, label in found], np.int32)
        start += len(found)
    return splits, classes, f"{len(paths)} pictures of {len(classes)} classes from {root}"


def _inside(folder):
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def _npz(place, size, *_):
    path = path_of(place)
    if size:
        raise DataError("image_size is for folder: and tfds:; bring the arrays of an npz file to their size yourself")
    try:
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if {"images", "labels"} <= names:
                return {"train": (file["images"], file["labels"])}, (), f"arrays from {path}"
            splits = {split: (file[f"{split}_images"], file[f"{split}_labels"]) for split in ("train", "validation", "test")
                      if {f"{split}_images", f"{split}_labels"} <= names}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        pickled = "allow_pickle" in str(error)  # numpy's advice would be to execute it
        words = "it holds objects, or is something else" if pickled else str(error)[:200]
        raise DataError(f"{path} is no npz file of plain arrays: {words}") from error
    if not {"train", "test"} <= splits.keys():
        raise DataError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}; expected train_images, train_labels, "
                        "test_images and test_labels, or images and labels")
    return splits, (), f"arrays from {path}"


def _tfds(place, size, data_dir, streamed):
    name, _, split = place.partition(":")
    if not re.fullmatch(r"[a-z]\w*(/[\w.+-]+)?", name):
        raise DataError(f"{place!r} names no set of tensorflow-datasets; expected NAME, NAME/config or NAME/config:split")
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils.file_utils import list_data_dirs

    for folder in list_data_dirs(data_dir):
        known_features(Path(folder, name.partition("/")[0]))
    try:
        sources = tfds.data_source(name, data_dir=data_dir)
        features = next(iter(sources.values())).dataset_info.features
    except Exception as error:  # of many kinds
        words = " ".join(str(error).split())[:300]
        raise DataError(f"tensorflow-datasets cannot give {name}: {type(error).__name__}: {words}") from error
    if not {"image", "label"} <= set(features):
        raise DataError(f"{name} has {', '.join(features)}; expected an image and a label")
    if split and split not in sources:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(sources)}")
    wanted = {"train": split} if split else {key: key for key in ("train", "validation", "test") if key in sources}
    if "train" not in wanted:
        raise DataError(f"{name} has no split train, but {', '.join(sources)}; name one of them, tfds:{name}:SPLIT")
    *space, channels = features["image"].shape
    shape = (size, size, channels) if size else (*space, channels)
    streams = None not in shape and stream.wanted(streamed, sum(len(sources[found]) for found in wanted.values()), shape)
    if streamed is True and not streams:
        raise DataError(f"the images of {name} have no one shape, {shape}, so they cannot be streamed; say with image_size "
                        "what they shall be brought to")
    if streams:
        bare = tfds.data_source(name, data_dir=data_dir, decoders={"image": tfds.decode.SkipDecoding()})
        splits = {}
        for key, found in wanted.items():
            records = stream.Records(sources[found], f"{name}:{found}", size, shape)
            splits[key] = stream.Images(records, np.arange(len(bare[found]))), _labels(bare[found], records.what)
    else:
        splits = {key: _examples(sources[found], size, f"{name}:{found}") for key, found in wanted.items()}
    classes = tuple(getattr(features["label"], "names", None) or ())
    return splits, classes, f"{place} of tensorflow-datasets"


def _examples(source, size, what):
    images = []

    def label(example):
        image = np.asarray(example["image"])
        images.append(pictures.brought_to(image, size) if size else image)
        return example["label"]

    labels = _labels(source, what, label)
    if len(shapes := {image.shape for image in images}) > 1:
        raise DataError(f"the images of {what} have {len(shapes)} shapes, from {min(shapes)} to {max(shapes)}; say with "
                        "image_size what they shall be brought to")
    return np.stack(images), labels


def _labels(source, what, label=lambda example: example["label"]):
    """int32, of all examples one after another."""
    labels = []
    try:
        for k in tqdm(range(len(source)), f"reading {what}", unit="image", leave=False):
            labels.append(int(label(source[k])))
    except Exception as error:  # of many kinds
        words = " ".join(str(error).split())[:300]
        raise DataError(f"{what} cannot be read at image {len(labels)}: {type(error).__name__}: {words}") from error
    return np.array(labels, np.int32)


KINDS = {"folder": _folder, "npz": _npz, "tfds": _tfds}
