"""Networks: golden parameter counts, invariance before and after training, shapes, dtypes, bad settings."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from table import random_variables

import pdo_jax as pdo
from pdo_jax import fields, groups, stencils
from pdo_jax.networks import PAPER, MnistRotNet, ResNet, UNet


def parameters(network, *shape):
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape))
    return sum(math.prod(p.shape) for p in jax.tree.leaves(variables["params"]))


def test_parameters_of_the_mnist_network():
    """26 747 with the paper's flattening head, as in the paper; the invariant head and the best network have their own."""
    assert parameters(PAPER["mnist_rot"](), 1, 28, 28, 1) == 26_747
    pointwise, norm, linear = 7 * 8 * 64, 2 * 64, 64 * 10 + 10
    invariant = PAPER["mnist_rot"](head="invariant", head_features=64)
    assert parameters(invariant, 1, 28, 28, 1) == 26_747 - 4 * 4 * 56 * 10 + pointwise + norm + linear
    assert parameters(MnistRotNet(), 1, 28, 28, 1) == 21_142
    assert parameters(MnistRotNet(features=[6] * 6), 1, 28, 28, 1) == 21_142


def test_parameters_of_a_tapered_network():
    """Six widths are those of the six layers: operators × inputs × outputs × order (one orientation of an image), two norms."""
    widths = (1, 2, 3, 1, 4, 2)
    layers = 6 * (1 + 12 * sum(a * b for a, b in zip(widths, widths[1:], strict=False))) + 2 * sum(widths)
    head = 2 * 12 * 5 + 2 * 5 + 5 * 10 + 10
    assert parameters(MnistRotNet(features=widths, head_features=5), 1, 28, 28, 1) == layers + head


def test_parameters_of_a_network_of_ranks():
    """A layer of rank r has r (12 · 12 inputs + 6 operators · 12 outputs) parameters, its pointwise head r (12 · 12 + 64)."""
    network = MnistRotNet(features=12, head_features=64, ranks=(20, 16))
    layers, norms = 6 * 12 + 5 * 20 * (12 * 12 + 6 * 12), 6 * 2 * 12
    assert parameters(network, 1, 28, 28, 1) == layers + norms + 16 * (12 * 12 + 64) + 2 * 64 + 64 * 10 + 10 == 25_922


@pytest.mark.parametrize("name, ten, hundred, paper", [
    ("p8", 2_621_693, 2_654_183, 2.62e6), ("p6", 362_386, 376_516, 0.36e6), ("p6m", 372_587, 392_117, 0.37e6),
    ("p8_wide", 4_591_630, 4_649_320, 4.6e6)])
def test_parameters_of_the_papers_resnets(name, ten, hundred, paper):
    """The numbers of the paper's table for CIFAR-10, and those of the wider head for CIFAR-100."""
    assert parameters(PAPER[name](), 1, 32, 32, 3) == ten
    assert parameters(PAPER[name](num_classes=100), 1, 32, 32, 3) == hundred
    assert abs(ten / paper - 1) < 0.01


def test_depth_of_the_papers_resnets():
    """6 · blocks + 2: 26 for p6, p6m and the wide p8, 44 for p8; two layers a block, the first one and the linear one."""
    assert {name: 6 * network.keywords["blocks"] + 2 for name, network in PAPER.items() if name != "mnist_rot"} == {
        "p6": 26, "p6m": 26, "p8": 44, "p8_wide": 26}
    variables = jax.eval_shape(PAPER["p6"]().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    spatial = [k for k, v in variables.items() if "Conv" in k and v["kernel"].shape[0] == 9]
    assert len(spatial) == 25 and sum("Conv" in k for k in variables) == 27  # and two shortcuts


CUBE = groups.octahedral()
GAUSSIAN = functools.partial(stencils.gaussian_derivative, sigma=0.7)
POOLED = functools.partial(ResNet, blocks=1, downsample="pool", invariant=True)
INVARIANT = {
    "mnist": (MnistRotNet(), (28, 28), 1),
    "mnist, tapered": (MnistRotNet(features=(1, 2, 3, 1, 4, 2), head_features=8), (28, 28), 1),
    "resnet, p8": (POOLED(group=groups.cyclic(8), widths=(2, 3, 4)), (8, 8), 3),
    "resnet, p6m": (POOLED(group=groups.dihedral(6), widths=(2, 3), kernel_size=3), (4, 6), 1),
    "resnet, volumes": (POOLED(group=CUBE, widths=(2, 2), kernel_size=3), (4, 4, 4), 1),
}


@pytest.mark.parametrize("network, space, channels", INVARIANT.values(), ids=INVARIANT)
def test_logits_do_not_change_under_the_grids_own_turns(network, space, channels):
    """Every element that preserves the (even) grid leaves the logits alone to 1e-5, whatever parameters and averages are."""
    x = np.random.default_rng(0).normal(size=(2, *space, channels)).astype(np.float32)
    apply = jit(functools.partial(network.apply, random_variables(network, x)))
    logits = np.asarray(apply(x))
    assert logits.shape == (2, 10) and logits.dtype == np.float32
    assert np.abs(logits[0] - logits[1]).max() > 1e-2 * np.abs(logits).max()  # it sees something
    for matrix in network.group.elements[network.group.preserves_grid]:
        turned = apply(np.asarray(groups.transform(x, matrix)))
        np.testing.assert_allclose(turned, logits, atol=1e-5 * np.abs(logits).max())


def test_stride_and_pool_differ_in_symmetry():
    """On an even grid the paper's strides break the quarter turns, and the mean pooling keeps them."""
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32)
    errors = {}
    for downsample in ("stride", "pool"):
        network = ResNet(group=groups.cyclic(4), widths=(2, 3), blocks=1, invariant=True, downsample=downsample)
        variables = jit(network.init)(jax.random.key(0), x)
        apply = jit(functools.partial(network.apply, variables))
        errors[downsample] = pdo.equivariance.error(apply, x, network.group).max()
    assert errors["pool"] < 1e-5 < 1e-3 < errors["stride"]


def test_every_stage_halves_the_resolution():
    """Also where two stages have one width: 3 blocks of equal width give pointwise shortcuts at stages 2 and 3."""
    for downsample in ("stride", "pool"):
        network = ResNet(group=groups.cyclic(4), widths=(2, 2, 2), blocks=1, downsample=downsample)
        _, seen = jax.eval_shape(functools.partial(network.init_with_output, capture_intermediates=True),
                                 jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        sizes = [v["__call__"][0].shape[1] for k, v in seen["intermediates"].items() if "GroupConv" in k]
        assert sorted(set(sizes)) == [2, 4, 8]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("network, shape", [
    (MnistRotNet, (2, 28, 28, 1)), (functools.partial(MnistRotNet, head="paper", num_classes=3), (2, 28, 28, 2)),
    (functools.partial(ResNet, blocks=1, num_classes=100), (3, 9, 8, 3)),
    (functools.partial(ResNet, blocks=1, group=groups.reflection(1), downsample="pool", invariant=True), (2, 8, 1)),
], ids=["mnist", "mnist, paper's head", "resnet", "resnet, line"])
def test_shapes_and_dtypes(network, shape, dtype):
    """[batch, *space, channels] -> [batch, classes] in float32, whatever the compute dtype; parameters are float32."""
    network = network(dtype=dtype)
    x = jnp.zeros(shape)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    logits = jax.eval_shape(network.apply, variables, x)
    assert logits.shape == (shape[0], network.num_classes) and logits.dtype == jnp.float32


def test_bfloat16_logits_are_close():
    """An invariant network in bfloat16 gives the float32 logits to a few per cent."""
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    plain, half = (POOLED(widths=(3, 3), dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = jit(plain.init)(jax.random.key(0), x)
    expected, found = (jit(network.apply)(variables, x) for network in (plain, half))
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("network, message", [
    (MnistRotNet(head="flat"), "\"paper\" or \"invariant\", got 'flat'"),
    (ResNet(downsample="max"), "\"stride\" or \"pool\", got 'max'"),
    (MnistRotNet(group=CUBE), "3 axes of space"), (MnistRotNet(lowering="dens"), "lowering must be one of"),
    (MnistRotNet(features=(1, 2)), r"one number of channels or six, one for each layer, got \(1, 2\)"),
    (MnistRotNet(basis="papper"), '"paper" or an int'), (MnistRotNet(dropout=1.5), r"\[0, 1\)"),
])
def test_bad_settings_are_named(network, message):
    """A head, down-sampling, group, lowering, basis or rate that cannot be: ValueError with what was given."""
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))


@pytest.mark.parametrize("network", [
    MnistRotNet(features=1, head_features=2), PAPER["mnist_rot"](features=1), ResNet(widths=(1, 1, 1), blocks=1)])
def test_a_batch_of_none(network):
    """Logits [0, classes] of no images."""
    shape = (28, 28, 1) if isinstance(network, MnistRotNet) else (8, 8, 3)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, *shape))))
    assert jax.eval_shape(network.apply, variables, jnp.zeros((0, *shape))).shape == (0, 10)


P4M, P8 = groups.dihedral(4), groups.cyclic(8)
FIELDS = {  # network, space, channels
    "image to classes, p8, odd": (UNet(P8, (2, 3), 3, blocks=1), (7, 7), 2),
    "image to scalars, rectangle": (UNet(groups.dihedral(2), (1, 2), 1, blocks=1, pool=pdo.blur_pool), (5, 8), 1),
    "vectors to vectors, torus": (UNet(P4M, (2, 2, 2), fields.standard(P4M), fields.standard(P4M), blocks=1, periodic=True,
                                       pool=pdo.mean_pool, scheme=GAUSSIAN), (8, 8), 2),
    "vorticity to velocity, p4m": (UNet(P4M, (1, 2), fields.standard(P4M), fields.determinant(P4M)), (6, 6), 1),
    "volumes": (UNet(CUBE, (1, 1), 2, blocks=1), (4, 4, 4), 1),
}


@pytest.mark.parametrize("network, space, channels", FIELDS.values(), ids=FIELDS)
def test_dense_outputs_turn_with_the_input(network, space, channels):
    """A U-Net of images and fields, with running averages of its own: exact for every element that keeps the grid."""
    shape = (1, *space, channels, *([network.in_rep.dim] if network.in_rep else []))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    _, trained = jit(lambda x: network.init_with_output(jax.random.key(0), x, True))(x)
    apply = jit(functools.partial(network.apply, trained))
    y = apply(x)
    out = (1, network.out.dim) if isinstance(network.out, fields.Representation) else (network.out,)
    assert y.shape == (1, *space, *out) and y.dtype == jnp.float32 and y.std() > 0.1
    group = groups.from_elements(network.group.elements[network.group.preserves_grid])
    reps = [fields.restrict(rep, group) if isinstance(rep, fields.Representation) else None for rep in (
        network.in_rep, network.out)]
    errors = pdo.equivariance.error(apply, x, group, in_rep=reps[0], out_rep=reps[1])
    assert len(errors) in (4, 8, 24) and errors.max() < 1e-5
    if network.periodic:  # and it moves with the input, by what all levels can be moved
        np.testing.assert_allclose(apply(np.roll(x, 4, 1)), np.roll(y, 4, 1), atol=1e-5)


def test_what_a_unet_computes():
    """The parameters, counted by hand: 6 operators of order 2 for each pair of fields and relative element. And ``remat`` and
    bfloat16 change neither them nor, but for rounding, what is computed."""
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    plain = UNet(P8, (2, 3), out=5, blocks=2)
    convolutions = 6 * (1 * 2 + 8 * (2 * 2 + 2 * 3 + 3 * 3 + 5 * 2 + 2 * 2))
    assert parameters(plain, *x.shape) == convolutions + 2 * (2 + 2 + 3 + 3 + 2 + 2) + 2 * 5 + 5

    def run(network):
        def loss(params):
            y, stats = network.apply(variables | {"params": params}, x, True, mutable="batch_stats")
            return (y ** 2).mean(), (y, stats)

        return jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    variables = jit(plain.init)(jax.random.key(0), x)
    expected, found = run(plain), run(plain.clone(remat=True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    program = str(jax.make_jaxpr(lambda v: plain.clone(remat=True).apply(v, x, True, mutable="batch_stats"))(variables))
    assert program.count("remat") >= 3
    half = jit(plain.clone(dtype=jnp.bfloat16).apply)(variables, x)
    y = jit(plain.apply)(variables, x)
    assert half.dtype == jnp.float32 and 0 < np.linalg.norm(half - y) < 0.05 * np.linalg.norm(y)


@pytest.mark.parametrize("network, space, message", [
    (UNet(P8, (1, 1, 1), 1), (3, 9), r"3 levels takes sizes of at least 4 along every axis, got \[3, 9\]"),
    (UNet(P8, (1, 1, 1), 1, periodic=True), (8, 10), r"periodic UNet of 3 levels takes sizes multiples of 4 .* \[8, 10\]"),
    (UNet(P8, (1, 1), 1, periodic=True, kernel_size=9), (6, 6), "multiples of 2 from 8 on"),
    (UNet(CUBE, (1, 1), 1), (8, 1), "3 axes of space"), (UNet(P8, (1,), 1, fields.standard(P4M)), (8, 8), "PDOConv"),
])
def test_a_unet_refuses_other_sizes(network, space, message):
    """What cannot be halved so often, or goes once around the torus and further, or has other axes, is named before compute."""
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *space, 1)))
