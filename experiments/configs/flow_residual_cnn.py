"""The baseline of flow_residual_p4m.py: a plain residual network of as many parameters.

    python -m experiments.main --config experiments/configs/flow_residual_cnn.py

Recorded (1 seed, last epoch): 0.448 relative L2 error of the change, in 177 s on one CPU core that other jobs shared.
"""

from experiments.baselines import ResidualCNN
from experiments.configs.flow_p4m import config as p4m

config = p4m | dict(network=ResidualCNN(width=9, blocks=5))
