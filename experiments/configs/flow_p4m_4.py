"""The U-Net of p4m as in flow_p4m.py, trained on 4 trajectories in as many updates.

    python -m experiments.main --config experiments/configs/flow_p4m_4.py
"""

from experiments.configs.flow_p4m import config as base
from experiments.configs.flow_p4m import trained_on

config = base | trained_on(4)
