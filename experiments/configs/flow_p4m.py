"""One step of decaying turbulence by a U-Net of p4m: velocity fields to their change, from 16 trajectories.

    python -m experiments.main --config experiments/configs/flow_p4m.py

The first time the flow is simulated, which needs `pip install exponax` and takes about a minute. The input and the output are
vector fields of p4m on a torus of 64² points; see docs/flow.md. Other numbers of trajectories: flow_p4m_4.py, flow_p4m_64.py.

Recorded (1 seed, last epoch): 0.192 relative L2 error of the change, in 243 s on one CPU core that other jobs shared.
"""

from functools import partial

import pdo_jax as pdo
from experiments import losses
from experiments.config import warmup_cosine
from experiments.datasets import augment

P4M = pdo.groups.dihedral(4)
VECTOR = pdo.fields.standard(P4M)


def trained_on(trajectories: int) -> dict:
    """So many trajectories, ten pairs each, in as many updates whatever their number: 800."""
    epochs = 640 // trajectories
    rate = partial(warmup_cosine, 1e-2, epochs / 20)
    return dict(dataset=f"flow/{trajectories}", epochs=epochs, learning_rate=rate)


config = dict(
    network=pdo.networks.UNet(P4M, widths=(3, 4, 6), out=VECTOR, in_rep=VECTOR, periodic=True, pool=pdo.mean_pool),
    loss=losses.relative_l2,
    metrics={},
    moments=augment.scale,
    augment=partial(augment.disturb, deviation=0.02),
    batch_size=8,
    eval_batch_size=40,
    **trained_on(16),
)
