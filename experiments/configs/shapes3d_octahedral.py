"""Tetracubes (generated volumes of 17³ points) by PDO-eConvs of the 24 rotations of the cube; 12 436 parameters.

    python -m experiments.main --config experiments/configs/shapes3d_octahedral.py

In training the shapes are tilted by up to 30°, in the test turned at random by any angle; 8 classes, chance is 87.5 % error.
Recorded (1 seed, last epoch): 28.7 % test error, 396 s on two CPU cores that other jobs shared; the plain CNN of equal
parameters (shapes3d_cnn.py) gets 78.7 %, and 29.5 % if it is trained on all rotations (--set dataset=shapes3d/turned).
"""

from functools import partial

import pdo_jax as pdo
from experiments.config import warmup_cosine
from experiments.volumes import VolumeNet

config = dict(
    network=VolumeNet(pdo.groups.octahedral(), widths=(4, 5, 5), head_features=12),
    dataset="shapes3d",
    epochs=5,
    batch_size=32,
    learning_rate=partial(warmup_cosine, 1e-2, 1),
    l2=1e-4,
    eval_batch_size=100,
)
