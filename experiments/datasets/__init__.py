"""Data sets as arrays in memory (`load`), and their augmentations as jitted functions (`augment`)."""

from .sources import DataError
from .store import SPLITS, Dataset, Split, hold_out, load

__all__ = ["SPLITS", "DataError", "Dataset", "Split", "hold_out", "load"]
