"""cnn"""
from experiments.configs.shapes3d_octahedral import config as octahedral
from experiments.volumes import VolumeCNN

config = octahedral | dict(network=VolumeCNN(widths=(12, 14, 18), head_features=24))
