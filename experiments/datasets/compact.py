"""CIFAR-10 in a form that travels: mosaics of 1 000 images as lossless WebP, about 100 MB in parts of at most 55 MB.

    python -m experiments.datasets.compact FOLDER      writes cifar10-part1.zip, cifar10-part2.zip

On a machine without network put the parts into the folder `manual` of the data sets (~/.cache/pdo_jax/manual, or
PDO_DATA_DIR/manual); `load("cifar10")` then reads them, and checks every pixel and label against a pinned checksum.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .sources import DataError

PART = 55_000_000  # bytes of a part, at most
MOSAIC = (25, 40)  # images, down and across
SPLITS = ("train", "test")


def write(folder: Path, name: str, splits) -> list[Path]:
    """Writes the uint8 images [n, H, W, 3] and labels (below 256) of each split; returns the parts' paths."""
    per_mosaic, files = MOSAIC[0] * MOSAIC[1], []
    for split in SPLITS:
        images, labels = splits[split]
        for start in tqdm(range(0, len(labels), per_mosaic), desc=f"packing {split}", unit="mosaic"):
            part = slice(start, start + per_mosaic)
            member = f"{split}-{start:05d}"
            files.append({f"{member}.webp": _encode(images[part]), f"{member}.labels": np.uint8(labels[part]).tobytes()})
    folder.mkdir(parents=True, exist_ok=True)
    parts, size = [[]], 0
    for file in files:
        bytes_ = sum(map(len, file.values())) + 1000  # of the archive's own, at most
        if parts[-1] and size + bytes_ > PART:
            parts.append([])
            size = 0
        parts[-1].append(file)
        size += bytes_
    paths = [folder / f"{name}-part{k}.zip" for k in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        with zipfile.ZipFile(path, "w") as archive:  # stored: WebP does not shrink further
            for member, data in ((member, data) for file in part for member, data in file.items()):
                archive.writestr(member, data)
    return paths


def read(folder: Path, name: str, shape=(32, 32, 3)) -> bytes:
    """What `content` gives for the splits that were written.

    Raises:
      FileNotFoundError: there are no parts.
      DataError: a part is damaged. That one is missing shows in the checksum.
    """
    paths = sorted(folder.glob(f"{name}-part*.zip"))
    if not paths:
        raise FileNotFoundError(f"no {name}-part*.zip there")
    members = {}
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                members |= {member: archive.read(member) for member in archive.namelist()}
        except (zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"{path} is damaged ({error}); copy it again") from error
    splits = {}
    for split in SPLITS:
        names = sorted(member.removesuffix(".webp") for member in members if Path(member).match(f"{split}-*.webp"))
        labels = [np.frombuffer(members[f"{member}.labels"], np.uint8) for member in names]
        images = [_decode(members[f"{member}.webp"], len(some), shape) for member, some in zip(names, labels, strict=True)]
        splits[split] = tuple(np.concatenate(arrays) if names else np.zeros(0, np.uint8) for arrays in (images, labels))
    return content(splits)


def content(splits) -> bytes:
    """All that a data set holds, in one order: the bytes of images and of labels, of train and of test."""
    return b"".join(np.ascontiguousarray(array, np.uint8).tobytes() for split in SPLITS for array in splits[split])


def parse(data: bytes, train: int, shape=(32, 32, 3)):
    """The splits that `content` made the bytes of, `train` images of them in the first."""
    size, splits = int(np.prod(shape)), {}
    counts = {"train": train, "test": len(data) // (size + 1) - train}
    array, at = np.frombuffer(data, np.uint8), 0
    for split, count in counts.items():
        images, labels = array[at : at + count * size], array[at + count * size : at + count * (size + 1)]
        splits[split] = images.reshape(count, *shape), labels.astype(np.int32)
        at += count * (size + 1)
    return splits


def _encode(images: np.ndarray) -> bytes:
    (down, across), (n, height, width, channels) = MOSAIC, images.shape
    filled = np.zeros((down * across, height, width, channels), np.uint8)
    filled[:n] = images
    mosaic = filled.reshape(down, across, height, width, channels).swapaxes(1, 2)
    buffer = io.BytesIO()
    Image.fromarray(mosaic.reshape(down * height, across * width, channels)).save(buffer, "WEBP", lossless=True, exact=True)
    return buffer.getvalue()


def _decode(data: bytes, count: int, shape) -> np.ndarray:
    (down, across), (height, width, channels) = MOSAIC, shape
    mosaic = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(down, height, across, width, channels)
    return mosaic.swapaxes(1, 2).reshape(-1, *shape)[:count]


if __name__ == "__main__":
    from . import load

    parser = argparse.ArgumentParser("python -m experiments.datasets.compact", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    dataset = load("cifar10")
    pixels = {s: (np.uint8(np.rint(getattr(dataset, s).images * 255)), getattr(dataset, s).labels) for s in SPLITS}
    for path in write(parser.parse_args().folder, "cifar10", pixels):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
