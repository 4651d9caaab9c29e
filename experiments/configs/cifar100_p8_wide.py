"""The paper's wide p8 ResNet-26 on CIFAR-100: 4 649 320 parameters.

    python -m experiments.main --config experiments/configs/cifar100_p8_wide.py

The paper's test error is 18.40 %. Otherwise as cifar10_p8.py.

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.cifar10_p8 import config as base

config = base | dict(dataset="cifar100", network=pdo.networks.PAPER["p8_wide"](num_classes=100))
