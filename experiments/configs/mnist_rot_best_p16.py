"""The network of mnist_rot_best.py with sixteen rotations and as many parameters: 20 932.

    python -m experiments.main --config experiments/configs/mnist_rot_best_p16.py

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.mnist_rot_best import config as base

config = base | dict(network=pdo.networks.MnistRotNet(group=pdo.groups.cyclic(16), features=5, head_features=96))
