"""The plain U-Net with turned pairs as in flow_cnn_augmented.py, trained on 4 trajectories in as many updates.

    python -m experiments.main --config experiments/configs/flow_cnn_augmented_4.py
"""

from experiments.configs.flow_cnn_augmented import config as base
from experiments.configs.flow_p4m import trained_on

config = base | trained_on(4)
