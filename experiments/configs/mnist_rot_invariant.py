"""The paper's run with the exactly invariant head: pooled over the group and over space, 8 % of the head's weights.

    python -m experiments.main --config experiments/configs/mnist_rot_invariant.py

Not yet run here to its end.
"""

import pdo_jax as pdo
from experiments.configs.mnist_rot import config as paper

config = paper | dict(network=pdo.networks.MnistRotNet(group=pdo.groups.cyclic(8), head="invariant"))
