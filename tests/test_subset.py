"""The embedded subset of rotated MNIST."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments.datasets import Dataset, Split, load, make_subset, store


def test_the_subset_holds_the_digits_it_was_made_of():
    """Checksums of the first 6 000 and 1 000 digits of mnist_rot/regenerated, taken where that was prepared."""
    with np.load(store.SUBSET) as arrays:
        sums = {name: hashlib.sha256(arrays[name].tobytes()).hexdigest()[:16] for name in arrays}
    assert sums == {
        "train_images": "802f8f9ca2f575ab",
        "train_labels": "c6509879bedea61f",
        "test_images": "5aacd38843b3969f",
        "test_labels": "b7a541b9162285a1",
    }
    dataset = load("mnist_rot/subset", validation=500)
    assert [split.images.shape for split in dataset[1:4]] == [(5500, 28, 28, 1), (500, 28, 28, 1), (1000, 28, 28, 1)]
    assert dataset.train.images.min() == 0 and dataset.train.images.max() == 1
    assert "not the official file" in dataset.note


def test_making_the_subset_is_reproducible(tmp_path):
    subset = load("mnist_rot/subset")
    more = Split(*(np.concatenate([array, array[:50]]) for array in subset.train))
    whole = Dataset("mnist_rot/regenerated", more, subset.validation, subset.test, 10, "")
    make_subset.write(tmp_path / "again.npz", whole)
    with np.load(tmp_path / "again.npz") as again, np.load(store.SUBSET) as embedded:
        assert sorted(again) == sorted(embedded)
        for name in again:
            np.testing.assert_array_equal(again[name], embedded[name])


def test_the_subset_needs_neither_tfds_nor_jax():
    check = "import sys; from experiments.datasets import load; load('mnist_rot/subset'); print(*sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True, check=True)
    assert not {"tensorflow_datasets", "jax"} & set(done.stdout.split())
