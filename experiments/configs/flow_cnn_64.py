"""The plain U-Net as in flow_cnn.py, trained on 64 trajectories in as many updates.

    python -m experiments.main --config experiments/configs/flow_cnn_64.py
"""

from experiments.configs.flow_cnn import config as base
from experiments.configs.flow_p4m import trained_on

config = base | trained_on(64)
