"""The paper's wide p8 ResNet-26 on CIFAR-10: 4 591 630 parameters.

    python -m experiments.main --config experiments/configs/cifar10_p8_wide.py

The paper's test error is 3.50 %. Otherwise as cifar10_p8.py.

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.cifar10_p8 import config as base

config = base | dict(network=pdo.networks.PAPER["p8_wide"]())
