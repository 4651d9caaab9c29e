"""The paper's p6 ResNet-26 on CIFAR-10: 362 386 parameters.

    python -m experiments.main --config experiments/configs/cifar10_p6.py

The paper's test error is 5.65 %. Otherwise as cifar10_p8.py.

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.cifar10_p8 import config as base

config = base | dict(network=pdo.networks.PAPER["p6"]())
