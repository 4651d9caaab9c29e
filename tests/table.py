"""One table of all that acts on fields, for the tests that put it under every transformation: small, in one, two and three
dimensions, convolutions under every lowering."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import pdo_jax as pdo
from pdo_jax import fields, groups, lowering, nonlinearities

GROUPS = {1: groups.reflection(1), 2: groups.cyclic(4), 3: groups.from_generators([np.diag([-1.0, -1, 1]), -np.eye(3)])}
SPACE = {1: (5,), 2: (4, 5), 3: (3, 3, 4)}
CHANNELS = 2
MASKS = {dim: np.arange(np.prod(space)).reshape(space) % 4 > 0 for dim, space in SPACE.items()}


class Item(NamedTuple):
    """``call(variables, x)``, with all state that it changes; ``variables`` holds parameters alone, or nothing."""

    call: Callable
    variables: Any
    x: jax.Array


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def apart(x):
    """The values of x in their order, but evenly spaced, so that no small step changes which one is the largest."""
    return (x.reshape(-1).argsort().argsort().reshape(x.shape) / 8).astype(x.dtype)


def random_variables(layer, x, *arguments):
    """Nothing is run to make them; those that are no parameters are at least 1."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda x: layer.init(keys, x, *arguments), x))
    variables = tree.unflatten([normal(*w.shape, seed=k, dtype=w.dtype) / 2 for k, w in enumerate(leaves)])
    return {name: value if name == "params" else jax.tree.map(lambda v: 1 + abs(v), value) for name, value in variables.items()}


def module(layer, x, *arguments, **options):
    """An item of a Flax module, of random variables; running averages are given, and returned with the output."""
    variables = random_variables(layer, x, *arguments)
    rest = {name: value for name, value in variables.items() if name != "params"}

    def call(params, x):
        return layer.apply({"params": params, **rest}, x, *arguments, mutable=list(rest), **options)

    return Item(call, variables.get("params", {}), x)


class Network(nn.Module):
    """Lifting, norm, ReLU, pooling, group convolution, invariant logits."""

    group: groups.Group
    lowering: str

    @nn.compact
    def __call__(self, x, train):
        options = dict(group=self.group, kernel_size=3, lowering=self.lowering)
        x = nn.tanh(pdo.GroupBatchNorm(self.group)(pdo.LiftingConv(2, **options)(x), train))
        x = pdo.GroupConv(2, padding="CIRCULAR", **options)(pdo.mean_pool(x, self.group))
        return nn.Dense(3)(pdo.group_pool(x, self.group).mean(range(1, 1 + self.group.dim)))


def items(dim, batch=2, dtype=jnp.float32):
    """{name: a function that makes the item}"""
    group, space = GROUPS[dim], SPACE[dim]
    regular, vector = fields.regular(group), fields.standard(group)
    mixed = fields.direct_sum([fields.trivial(group), vector])
    every = fields.direct_sum(fields.irreps(group))
    gated = nonlinearities.GatedNonlinearity(mixed)

    def field(size=group.order, seed=1):
        return normal(batch, *space, CHANNELS, *[size] * (size is not None), seed=seed, dtype=dtype)

    made = {}
    for way in lowering.LOWERINGS:
        if way != "fourier" or dim == 2:
            options = dict(lowering=way, kernel_size=3)
            made |= {
                f"LiftingConv {way}": lambda o=options: module(pdo.LiftingConv(2, group, strides=2, **o), field(None)),
                f"GroupConv {way}": lambda o=options: module(pdo.GroupConv(2, group, use_bias=True, **o), field()),
            }
        if way != "fourier":
            made[f"PDOConv {way}"] = lambda o=options: module(pdo.PDOConv(2, vector, mixed, **o), field(dim))
    made["GroupConv in parts, dilated"] = lambda: module(pdo.GroupConv(
        4, group, kernel_size=3, kernel_dilation=2, padding="EDGE", feature_group_count=2, spacing=(1, 1, 2.5)[-dim:]), field())
    made["GroupConv transposed"] = lambda: module(pdo.GroupConv(3, group, kernel_size=3, strides=2, transpose=True), field())
    made["PDOConv transposed"] = lambda: module(pdo.PDOConv(
        2, vector, mixed, kernel_size=3, strides=2, padding="REFLECT", transpose=True), field(dim))
    if dim == 2:
        made["max_pool, tiling"] = lambda: Item(lambda _, x: pdo.max_pool(x, group), {}, apart(field()[:, :, :4]))
        made["network"] = lambda: module(Network(group, "auto"), field(None), True)
    if dim > 1:
        made["UNet"] = lambda: module(pdo.networks.UNet(
            group, (1, 2), vector, blocks=1, pool=pdo.mean_pool, activation=nn.tanh), field(None), True)
    return made | {
        "GroupBatchNorm, training": lambda: module(pdo.GroupBatchNorm(group), field(), True),
        "GroupBatchNorm, scalars": lambda: module(pdo.GroupBatchNorm(group), field(None), True),
        "GroupBatchNorm, inference": lambda: module(pdo.GroupBatchNorm(group), field(), False),
        "FieldBatchNorm, training": lambda: module(nonlinearities.FieldBatchNorm(mixed), field(1 + dim), True),
        "GroupBatchNorm, training, masked": lambda: module(pdo.GroupBatchNorm(group), field(), True, MASKS[dim]),
        "FieldBatchNorm, training, masked": lambda: module(
            nonlinearities.FieldBatchNorm(mixed), field(1 + dim), True, MASKS[dim]),
        "FieldNorm": lambda: module(nonlinearities.FieldNorm(mixed), field(1 + dim)),
        "FieldNorm, masked": lambda: module(nonlinearities.FieldNorm(group, num_groups=1), field(), MASKS[dim]),
        "FieldNorm, points, scalars": lambda: module(nonlinearities.FieldNorm(
            group, num_groups=1, space=False, epsilon=0.5), field(None)),
        "fourier": lambda: Item(lambda _, x: nonlinearities.fourier(every, nn.tanh)(x), {}, field(every.dim)),
        "NormNonlinearity": lambda: module(
            nonlinearities.NormNonlinearity(mixed, epsilon=0.1, bias_init=nn.initializers.ones), field(1 + dim)),
        "GatedNonlinearity": lambda: module(gated, field(gated.in_rep.dim)),
        "GroupDropout": lambda: module(pdo.GroupDropout(0.5, group), field(), True, rngs={"dropout": jax.random.key(2)}),
        "max_pool": lambda: Item(lambda _, x: pdo.max_pool(x, group), {}, apart(field())),
        "max_pool 2/1": lambda: Item(lambda _, x: pdo.max_pool(x, regular, 2, 1), {}, apart(field())),
        "mean_pool": lambda: Item(lambda _, x: pdo.mean_pool(x, vector), {}, field(dim)),
        "norm_max_pool": lambda: Item(lambda _, x: pdo.norm_max_pool(x, vector), {}, field(dim)),
        "mean_pool 3/1 periodic": lambda: Item(lambda _, x: pdo.mean_pool(x, group, 3, 1, periodic=True), {}, field()),
        "adaptive_pool": lambda: Item(lambda _, x: pdo.adaptive_pool(x, vector, 2), {}, field(dim)),
        "group_pool over a subgroup": lambda: Item(
            lambda _, x: pdo.group_pool(x, group, subgroup=[0, group.order // 2]), {}, field()),
        "upsample": lambda: Item(lambda _, x: pdo.upsample(x, vector), {}, field(dim)),
        "upsample nearest": lambda: Item(lambda _, x: pdo.upsample(x, group, 2, "nearest", sizes=[
            2 * n - 1 for n in space]), {}, field(None)),
        "blur_pool": lambda: Item(lambda _, x: pdo.blur_pool(x, group), {}, field(None)),
        "group_pool mean": lambda: Item(lambda _, x: pdo.group_pool(x, group), {}, field()),
        "group_pool max": lambda: Item(lambda _, x: pdo.group_pool(x, regular, "max"), {}, apart(field())),
    }


ALL = [(dim, name) for dim in GROUPS for name in items(dim)]
DIFFERENT = ("LiftingConv auto", "GroupConv auto", "PDOConv auto", "GroupBatchNorm, training", "max_pool")  # in every dimension
TWINS = ("FieldNorm, points, scalars", "FieldBatchNorm, training, masked", "upsample nearest", "mean_pool 3/1 periodic", "UNet")
CORE = [(dim, name) for dim, name in ALL if name in DIFFERENT or dim == 2 and name not in TWINS]
"""All of the plane but twins of others, and of the line and of space what is computed differently there: for tests that
compile."""


def has_statistics(name):
    """Of the batch, so that an example's output depends on the others."""
    return any(word in name for word in ("training", "scalars", "network", "UNet"))
