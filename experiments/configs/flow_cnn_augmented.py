"""The plain U-Net of flow_cnn.py, trained on pairs that are turned by elements of p4m drawn at random.

    python -m experiments.main --config experiments/configs/flow_cnn_augmented.py

Recorded (1 seed, last epoch): 0.373 relative L2 error of the change, in 135 s on one CPU core that other jobs shared.
"""

from functools import partial

from experiments.configs.flow_cnn import config as cnn
from experiments.configs.flow_p4m import VECTOR
from experiments.datasets import augment

TURN = partial(augment.turn, in_rep=VECTOR, out_rep=VECTOR)

config = cnn | dict(augment=partial(augment.in_turn, functions=(TURN, cnn["augment"])))
