"""Makes the embedded data set again, with the same content bit for bit: python -m experiments.datasets.make_subset

It holds the first digits of each split of `mnist_rot/regenerated`, grey levels and labels as bytes.
"""

import numpy as np

from .store import SUBSET, Dataset, load

SIZES = {"train": 6000, "test": 1000}  # examples; 1.7 MB


def write(file, dataset: Dataset) -> None:
    """Writes the subset of `dataset`, a loaded `mnist_rot/regenerated`, as a compressed npz."""
    arrays = {}
    for split, size in SIZES.items():
        images, labels = getattr(dataset, split)
        arrays[f"{split}_images"] = np.rint(images[:size] * 255).astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:size].astype(np.uint8)
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    write(SUBSET, load("mnist_rot/regenerated"))
