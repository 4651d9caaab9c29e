"""The plain CNN of 21 620 parameters in the recipe of mnist_rot_best.py.

    python -m experiments.main --config experiments/configs/mnist_rot_best_cnn.py
"""

from experiments.baselines import MnistRotCNN
from experiments.configs.mnist_rot_best import config as base

config = base | dict(network=MnistRotCNN())
