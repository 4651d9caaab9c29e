"""The baseline of shapes3d_octahedral.py: a plain 3-D CNN of the same layout and 12 432 parameters.

    python -m experiments.main --config experiments/configs/shapes3d_cnn.py

Recorded (1 seed, last epoch): 78.7 % test error, 125 s on two CPU cores that other jobs shared; trained on all rotations
(--set dataset=shapes3d/turned) 29.5 %, 34 s.
"""

from experiments.configs.shapes3d_octahedral import config as octahedral
from experiments.volumes import VolumeCNN

config = octahedral | dict(network=VolumeCNN(widths=(12, 14, 18), head_features=24))
