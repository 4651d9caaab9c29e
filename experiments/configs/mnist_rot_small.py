"""A small network on rotated MNIST, trained in one go: 12 000 digits, no augmentation, 21 142 parameters.

    python -m experiments.main --config experiments/configs/mnist_rot_small.py

Twelve rotations, operators of order at most 2 as Gaussian derivatives, SiLU, the invariant head, label smoothing, an average of
weights. All was chosen on 2 000 validation digits (--set validation=2000). Seeds: --set seed=1.

Recorded (5 seeds, last epoch, regenerated data): 1.13 ± 0.02 % test error, in 7 minutes on two quiet CPU cores, up to 1676 s
where other jobs shared them.
"""

from functools import partial

import pdo_jax as pdo
from experiments.config import warmup_cosine

config = dict(
    network=pdo.networks.MnistRotNet(),
    dataset="mnist_rot/regenerated",
    epochs=40,
    batch_size=64,
    learning_rate=partial(warmup_cosine, 1e-2, 2),
    l2=1e-3,
    label_smoothing=0.1,
    ema=0.998,
    dtype="bfloat16",
)
