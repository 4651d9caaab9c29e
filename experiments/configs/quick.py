"""quick"""
import pdo_jax as pdo
config = dict(network=pdo.networks.MnistRotNet(group=pdo.groups.cyclic(8)), epochs=2, validation=200, batch_size=64, learning_rate=3e-3,l2=1e-4)
