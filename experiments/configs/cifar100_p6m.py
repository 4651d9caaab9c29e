"""The paper's p6m ResNet-26, six turns and reflections, on CIFAR-100: 392 117 parameters.

    python -m experiments.main --config experiments/configs/cifar100_p6m.py

The paper's test error is 27.00 %. Otherwise as cifar10_p8.py.

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.cifar10_p8 import config as base

config = base | dict(dataset="cifar100", network=pdo.networks.PAPER["p6m"](num_classes=100))
