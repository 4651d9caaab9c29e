"""Rotated MNIST with random rotations in training, and 62 050 parameters; otherwise as mnist_rot_augmented.py.

    python -m experiments.main --config experiments/configs/mnist_rot_augmented_small.py

Recorded: 0.93 ± 0.01 % test error (3 seeds, last epoch, regenerated data), in 170 s on an H200 that other runs shared and
45 minutes on one CPU core.
"""

import pdo_jax as pdo
from experiments.configs.mnist_rot_augmented import config as base

config = base | dict(network=pdo.networks.MnistRotNet(features=12, head_features=64, dropout=0.1))
