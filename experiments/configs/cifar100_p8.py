"""The paper's p8 ResNet-44 on CIFAR-100: 2 654 183 parameters.

    python -m experiments.main --config experiments/configs/cifar100_p8.py

The paper's test error is 20.01 %. Otherwise as cifar10_p8.py.

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.cifar10_p8 import config as base

config = base | dict(dataset="cifar100", network=pdo.networks.PAPER["p8"](num_classes=100))
