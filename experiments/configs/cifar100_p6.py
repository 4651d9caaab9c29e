"""The paper's p6 ResNet-26 on CIFAR-100: 376 516 parameters.

    python -m experiments.main --config experiments/configs/cifar100_p6.py

The paper's test error is 27.13 %. Otherwise as cifar10_p8.py.

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.cifar10_p8 import config as base

config = base | dict(dataset="cifar100", network=pdo.networks.PAPER["p6"](num_classes=100))
