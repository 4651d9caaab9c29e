"""The baseline of CIFAR-10: a plain pre-activation ResNet-26 of 369 498 parameters, settings as cifar10_p8.py.

    python -m experiments.main --config experiments/configs/cifar10_cnn.py

The paper quotes 11.5 % test error for 0.37M parameters. ResNetCNN(7, (32, 64, 128)) is the ResNet-44 of 2.64M, for
which it quotes 5.61 %.

Not yet run here.
"""

from experiments.baselines import ResNetCNN
from experiments.configs.cifar10_p8 import config as base

config = base | dict(network=ResNetCNN(blocks=4))
