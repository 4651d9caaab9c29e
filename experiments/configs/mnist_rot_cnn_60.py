"""The plain CNN of mnist_rot_cnn.py in 60 epochs, with the schedule of mnist_rot_60.py, in float32.

    python -m experiments.main --config experiments/configs/mnist_rot_cnn_60.py

Recorded (1 seed, last epoch): 5.47 % test error, 686 s on two CPU cores that other jobs shared.
"""

from experiments.baselines import MnistRotCNN
from experiments.configs.mnist_rot_60 import config as base

config = base | dict(network=MnistRotCNN(), dtype="float32")
