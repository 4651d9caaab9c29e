"""A program as a user writes it, with types: mypy and pyright have nothing to say about it (``tests/test_typing.py``)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import pdo_jax as pdo
import pdo_jax.nnx as pnn
from pdo_jax.fields import Representation
from pdo_jax.groups import Group


class Net(nn.Module):
    """Two convolutions of regular fields and a head."""

    group: Group
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        group = self.group
        x = pdo.LiftingConv(features=4, group=group, kernel_size=3, padding="CIRCULAR", lowering="dense",
                            name="lift")(x)
        x = nn.relu(pdo.GroupBatchNorm(group, momentum=0.95)(x, train))
        x = pdo.max_pool(x, group)
        x = pdo.GroupConv(features=4, group=group, strides=(1, 1), padding=[(1, 1), (1, 1)], frame=0.1, lowering="dense",
                          scheme=functools.partial(pdo.stencils.gaussian_derivative, sigma=1.0))(x)
        x = pdo.GroupDropout(0.2, group, channels=True)(x, train)
        x = pdo.blur_pool(pdo.mean_pool(x, group, window=2, strides=1), group)
        return nn.Dense(self.classes)(pdo.group_pool(x, group, "max").mean((1, 2)))


class Steerable(nn.Module):
    """Vectors out of an image."""

    rep: Representation

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        scalar, gate = pdo.fields.trivial(self.rep.group), pdo.nonlinearities.GatedNonlinearity(self.rep)
        y = gate(pdo.PDOConv(features=3, in_rep=scalar, out_rep=gate.in_rep)(x[..., None]))
        y = pdo.nonlinearities.FieldBatchNorm(self.rep)(y, train)
        return pdo.nonlinearities.NormNonlinearity(self.rep, bias_init=nn.initializers.zeros)(y)


def groups() -> list[Group]:
    quarter = [[0, -1], [1, 0]]
    return [pdo.groups.cyclic(8), pdo.groups.dihedral(6), pdo.groups.from_generators([quarter, np.diag([1.0, -1.0])]),
            pdo.groups.octahedral(reflections=True), pdo.groups.from_elements(pdo.groups.cyclic(4).elements)]


def representations(group: Group) -> Representation:
    irreps: tuple[Representation, ...] = pdo.fields.irreps(group)
    return pdo.fields.direct_sum([*irreps, pdo.fields.standard(group), pdo.fields.quotient(group, [0])])


def faces(group: Group) -> tuple[pnn.Face, jax.Array]:
    rngs = nnx.Rngs(0)
    lift = pnn.LiftingConv(1, 2, group, rngs=rngs, kernel_size=1, use_bias=True)
    norm, drop = pnn.GroupBatchNorm(2, group, rngs=rngs), pnn.GroupDropout(0.1, group, rngs=rngs)
    field: jax.Array = drop(norm(lift(jnp.ones((1, 2, 2, 1)))))
    network: pnn.Face = pnn.load_pretrained("mnist_rot_best", rngs=rngs)
    module, variables = network.to_linen()
    assert isinstance(module, nn.Module) and lift.features == 2
    return pnn.from_linen(module, variables), field


def main(folder: str) -> jax.Array:
    group = pdo.groups.cyclic(4)
    network, x = Net(group=group, classes=3), jax.random.normal(jax.random.key(0), (2, 12, 12, 1))
    variables = jax.jit(network.init, compiler_options=pdo.compiler_options())(jax.random.key(1), x)
    errors: np.ndarray = pdo.equivariance.error(lambda x: x ** 2, x, group)
    assert errors.shape == (group.order,)
    turned: jax.Array = pdo.groups.transform(np.ones((1, 4, 4, 1)), group.elements[1])
    field: jax.Array = pdo.groups.act(jnp.ones((1, 4, 4, 1, 4)), group, element=1)
    same: jax.Array = pdo.fields.act(field, pdo.fields.regular(group), 1)
    assert bool((same == field).all())
    assert pdo.equivariance.error(nn.relu, field, group, in_rep=group, out_rep=group).max() == 0
    smaller: jax.Array = pdo.fields.restrict_regular(field, group, pdo.groups.cyclic(2))
    assert turned.shape[1:3] == smaller.shape[1:3]

    plain, folded = pdo.export.to_plain(network, variables, (1, 12, 12, 1))
    logits = jax.jit(plain.apply)(folded, x)
    assert isinstance(logits, jax.Array)
    program: bytes = pdo.export.to_stablehlo(network, variables, (None, 12, 12, 1), platforms=["cpu"])
    call: Callable[[jax.Array], jax.Array] = pdo.export.from_stablehlo(program)
    about: dict[str, object] = pdo.export.about(program)
    assert about["dtype"] == "float32"
    again, read = pdo.networks.load_pretrained("mnist_rot_best")
    pdo.export.save(f"{folder}/net.safetensors", again, read)
    pdo.export.load(f"{folder}/net.safetensors", trust=["tests"])
    assert pdo.architecture.differences(again, pdo.networks.MnistRotNet(features=5))

    weights = pdo.kernels.bank(group, kernel_size=5, basis=2).stencils
    basis = pdo.steerable.basis(pdo.fields.trivial(group), pdo.fields.standard(group), order=1)
    vectors = Steerable(pdo.fields.standard(group))
    y, v = jax.jit(vectors.init_with_output)(jax.random.key(2), x)
    assert weights.ndim == 3 and basis.ndim == 4 and y.ndim == 5
    pdo.equivariance.check_layers(vectors, v, x)
    paper = pdo.networks.PAPER["p8"](num_classes=100)
    assert isinstance(paper, pdo.networks.ResNet) and paper.widths
    return call(x)
