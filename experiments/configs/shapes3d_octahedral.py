"""tetracubes by the 24 rotations of the cube."""
from functools import partial

import pdo_jax as pdo
from experiments.config import warmup_cosine
from experiments.volumes import VolumeNet

EPOCHS = 5

config = dict(
    network=VolumeNet(pdo.groups.octahedral(), widths=(4, 5, 5), head_features=12),
    dataset="shapes3d",
    epochs=EPOCHS,
    batch_size=32,
    learning_rate=partial(warmup_cosine, 1e-2, 1, EPOCHS),
    l2=1e-4,
    eval_batch_size=100,
)
