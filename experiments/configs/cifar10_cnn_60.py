"""The baseline of CIFAR-10 in a short recipe: a plain pre-activation ResNet-26 of 369 498 parameters, 60 epochs.

    python -m experiments.main --config experiments/configs/cifar10_cnn_60.py

Nesterov's momentum with batches of 256, a warm-up of 5 epochs, then half a cosine; crops and mirror images; an average of
weights.

Recorded: 8.67 % test error (1 seed, last epoch), in 176 s on an H200 that two other runs shared.
"""

from functools import partial

import optax

from experiments.baselines import ResNetCNN
from experiments.config import warmup_cosine
from experiments.datasets import augment

config = dict(
    network=ResNetCNN(blocks=4),
    dataset="cifar10",
    augment=augment.shift_and_flip,
    epochs=60,
    batch_size=256,
    optimizer=partial(optax.sgd, momentum=0.9, nesterov=True),
    learning_rate=partial(warmup_cosine, 0.2, 5),
    l2=5e-4,
    ema=0.998,
    dtype="bfloat16",
)
