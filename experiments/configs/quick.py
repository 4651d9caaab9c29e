"""The first run: the best small network on the embedded subset of rotated MNIST, in minutes on two CPU cores.

    python -m experiments.main --config experiments/configs/quick.py

The network is invariant: quarter turns change its logits by rounding only.
"""

from functools import partial

import pdo_jax as pdo
from experiments.config import warmup_cosine

EPOCHS = 12

config = dict(
    network=pdo.networks.MnistRotNet(dropout=0.1),
    dataset="mnist_rot/subset",
    validation=200,
    epochs=EPOCHS,
    batch_size=64,
    learning_rate=partial(warmup_cosine, 1e-2, 1, EPOCHS),
    l2=1e-3,
    label_smoothing=0.1,
    ema=0.99,
    eval_batch_size=200,
)
