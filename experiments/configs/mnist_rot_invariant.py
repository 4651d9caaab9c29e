"""The paper's run with the exactly invariant head, pooled over space and over the group: 22 149 parameters.

    python -m experiments.main --config experiments/configs/mnist_rot_invariant.py

Otherwise as mnist_rot.py.

Not yet run here.
"""

import pdo_jax as pdo
from experiments.configs.mnist_rot import config as base

config = base | dict(
    network=pdo.networks.PAPER["mnist_rot"](head="invariant", head_features=64),
)
