"""The U-Net of flow_p4m.py with the 16 elements of p8m, which are exact at quarter turns alone.

    python -m experiments.main --config experiments/configs/flow_p8m.py

Recorded (1 seed, last epoch): 0.149 relative L2 error of the change, in 475 s on one CPU core that other jobs shared.
"""

import pdo_jax as pdo
from experiments.configs.flow_p4m import config as p4m

P8M = pdo.groups.dihedral(8)
VECTOR = pdo.fields.standard(P8M)

config = p4m | dict(network=p4m["network"].clone(group=P8M, widths=(2, 3, 4), out=VECTOR, in_rep=VECTOR))
