"""A wider tapered network on rotated MNIST, without augmentation: p12, 12 channels at first, 64 at last, 520 430 parameters.

    python -m experiments.main --config experiments/configs/mnist_rot_tapered_wide.py

The recipe of mnist_rot_tapered.py with a dropout of 0.3.
"""

from experiments.configs.mnist_rot_tapered import config as base

config = base | dict(network=base["network"].clone(features=(12, 18, 28, 36, 48, 64), dropout=0.3))
