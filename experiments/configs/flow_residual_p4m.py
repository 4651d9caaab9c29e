"""A residual network of p4m in the place of flow_p4m.py's U-Net: all layers on 64² points.

    python -m experiments.main --config experiments/configs/flow_residual_p4m.py

Recorded (1 seed, last epoch): 0.260 relative L2 error of the change, in 791 s on one CPU core that other jobs shared.
"""

from experiments.configs.flow_p4m import VECTOR
from experiments.configs.flow_p4m import config as p4m
from experiments.residual import ResidualNet

config = p4m | dict(network=ResidualNet(VECTOR, width=4, blocks=5))
