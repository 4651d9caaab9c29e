"""The baseline of flow_p4m.py: a plain U-Net of the same layout and about as many parameters.

    python -m experiments.main --config experiments/configs/flow_cnn.py

Recorded (1 seed, last epoch): 0.381 relative L2 error of the change, in 127 s on one CPU core that other jobs shared.
"""

from experiments.baselines import UNetCNN
from experiments.configs.flow_p4m import config as p4m

config = p4m | dict(network=UNetCNN(widths=(7, 9, 14)))
