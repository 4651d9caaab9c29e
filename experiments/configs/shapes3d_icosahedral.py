"""ico"""
import pdo_jax as pdo
from experiments.configs.shapes3d_octahedral import config as octahedral
from experiments.volumes import VolumeNet

config = octahedral | dict(network=VolumeNet(pdo.groups.icosahedral(), widths=(3, 3, 3), head_features=8))
