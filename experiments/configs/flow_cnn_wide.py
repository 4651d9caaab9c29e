"""A plain U-Net with as many channels as flow_p4m.py has for all of its orientations, and so about as much to compute.

    python -m experiments.main --config experiments/configs/flow_cnn_wide.py
"""

from experiments.baselines import UNetCNN
from experiments.configs.flow_p4m import config as p4m

config = p4m | dict(network=UNetCNN(widths=(24, 32, 48)))
