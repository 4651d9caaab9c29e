"""The paper's p8 ResNet-44 on CIFAR-10: 2 621 693 parameters, 300 epochs.

    python -m experiments.main --config experiments/configs/cifar10_p8.py

The paper's test error is 3.68 %. Made for a GPU or TPU: an epoch is 390 updates of 128 images, and too slow on a CPU.
--set dtype=bfloat16 halves the memory of the feature maps.

Not yet run here.
"""

from functools import partial

import optax

import pdo_jax as pdo
from experiments.config import piecewise
from experiments.datasets import augment

config = dict(
    network=pdo.networks.PAPER["p8"](),
    dataset="cifar10",
    augment=augment.shift_and_flip,
    epochs=300,
    batch_size=128,
    optimizer=partial(optax.sgd, momentum=0.9, nesterov=True),
    learning_rate=partial(piecewise, {0: 0.1, 150: 0.01, 225: 0.001}),
    l2=1e-3,
)
