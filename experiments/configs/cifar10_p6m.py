"""The paper's p6m ResNet-26, six turns and reflections, on CIFAR-10: 372 587 parameters.

    python -m experiments.main --config experiments/configs/cifar10_p6m.py

The paper's test error is 5.38 %. Otherwise as cifar10_p8.py.

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.cifar10_p8 import config as base

config = base | dict(network=pdo.networks.PAPER["p6m"]())
