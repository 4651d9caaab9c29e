"""The first run: the best small network on the embedded subset of rotated MNIST, in minutes on two CPU cores.

    python -m experiments.main --config experiments/configs/quick.py

The network is invariant: quarter turns change its logits by rounding only. Measured: 3.2 % error on the 1 000 test digits (1
seed, float32), 46 s on two CPU cores from a cold start, compilation included. The hard SiLU is as good as SiLU and cheaper; in
so few epochs dropout costs accuracy.
"""

from functools import partial

from flax import linen as nn

import pdo_jax as pdo
from experiments.config import warmup_cosine

config = dict(
    network=pdo.networks.MnistRotNet(dropout=0.0, activation=nn.hard_silu),
    dataset="mnist_rot/subset",
    validation=200,
    epochs=5,
    batch_size=64,
    learning_rate=partial(warmup_cosine, 1e-2, 1),
    l2=1e-3,
    label_smoothing=0.1,
    ema=0.99,
    eval_batch_size=200,
)
