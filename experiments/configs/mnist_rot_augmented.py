"""Rotated MNIST with random rotations in training, and a wider network: 628 040 parameters.

    python -m experiments.main --config experiments/configs/mnist_rot_augmented.py

The paper reports 0.709 % test error for a network of 0.65M parameters or less, without saying its widths. Here: 40
channels, otherwise as mnist_rot.py; some 30 times the arithmetic of that run.

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.mnist_rot import config as base
from experiments.datasets import augment

config = base | dict(
    network=pdo.networks.PAPER["mnist_rot"](features=40),
    augment=augment.rotate,
)
