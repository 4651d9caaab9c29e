"""The best network of any size on rotated MNIST, without augmentation: 176 626 parameters.

    python -m experiments.main --config experiments/configs/mnist_rot_large.py

As mnist_rot_best.py, but 20 channels, a head of 128, and more dropout.
"""

import pdo_jax as pdo
from experiments.configs.mnist_rot_best import config as base

config = base | dict(network=pdo.networks.MnistRotNet(features=20, head_features=128, dropout=0.3))
