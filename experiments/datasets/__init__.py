"""Data sets as arrays in memory (`load`), and their augmentations as jitted functions (`augment`)."""

from .sources import DataError
from .store import Dataset, Split, load

__all__ = ["DataError", "Dataset", "Split", "load"]
