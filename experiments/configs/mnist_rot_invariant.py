"""The paper's run with the exactly invariant head, pooled over space and over the group: 22 149 parameters.

    python -m experiments.main --config experiments/configs/mnist_rot_invariant.py

Otherwise as mnist_rot.py.

Not yet run here.
"""

import math

import pdo_jax as pdo
from experiments.configs.mnist_rot import config as base

config = base | dict(
    network=pdo.networks.MnistRotNet(group=pdo.groups.cyclic(8), head="invariant", frame=math.pi / 8),
)
