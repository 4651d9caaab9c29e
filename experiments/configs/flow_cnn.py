"""The baseline of flow_p4m.py: a plain U-Net of the same layout and about as many parameters.

    python -m experiments.main --config experiments/configs/flow_cnn.py

Recorded: nothing yet.
"""

from experiments.baselines import UNetCNN
from experiments.configs.flow_p4m import config as p4m

config = p4m | dict(network=UNetCNN(widths=(7, 9, 14)))
