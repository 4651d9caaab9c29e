"""The faces for flax.nnx: the numbers, names and programs of linen, under the transformations of nnx."""

import collections
import copy
import functools
import inspect
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from quick import jit

import pdo_jax as pdo
import pdo_jax.nnx as pnn
from pdo_jax import fields, groups, nonlinearities

P4, LINE, FLIP = groups.cyclic(4), groups.reflection(1), groups.reflection(2)
REGULAR, VECTOR = fields.regular(P4), fields.standard(P4)
VALUES = fields.determinant(LINE)
MIXED = fields.direct_sum([fields.trivial(P4), VECTOR])
GATED = nonlinearities.GatedNonlinearity(VECTOR)
WIDE = dict(kernel_size=(3, 5), kernel_dilation=(3, 1), padding="VALID", feature_group_count=2)
SMALL = dict(group=FLIP, num_classes=3)
MNIST, RESNET = dict(SMALL, features=1, head_features=2), dict(SMALL, widths=(1, 1, 2), blocks=1, kernel_size=3)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


CASES = {  # the face, what it is of, an input
    "LiftingConv": (functools.partial(pnn.LiftingConv, 2, 3, P4), pdo.LiftingConv(3, P4), normal(2, 6, 6, 2)),
    "LiftingConv, options": (functools.partial(pnn.LiftingConv, 1, 2, LINE, use_bias=True, padding="VALID", basis=1),
                             pdo.LiftingConv(2, LINE, use_bias=True, padding="VALID", basis=1), normal(2, 9, 1)),
    "GroupConv": (functools.partial(pnn.GroupConv, 2, 3, P4, kernel_size=3, strides=2, padding="CIRCULAR"),
                  pdo.GroupConv(3, P4, 3, 2, "CIRCULAR"), normal(2, 6, 6, 2, 4)),
    "PDOConv": (functools.partial(pnn.PDOConv, 2, 3, VECTOR, MIXED, kernel_size=3),
                pdo.PDOConv(3, VECTOR, MIXED, kernel_size=3), normal(2, 5, 5, 2, 2)),
    "PDOConv, options": (functools.partial(pnn.PDOConv, 4, 2, VECTOR, MIXED, **WIDE), pdo.PDOConv(2, VECTOR, MIXED, **WIDE),
                         normal(2, 7, 9, 4, 2)),
    "GroupBatchNorm": (functools.partial(pnn.GroupBatchNorm, 3, P4, momentum=0.5), pdo.GroupBatchNorm(P4, 0.5),
                       normal(4, 3, 3, 3, 4)),
    "GroupBatchNorm, scalars": (functools.partial(pnn.GroupBatchNorm, 3, P4), pdo.GroupBatchNorm(P4), normal(4, 3, 3, 3)),
    "FieldBatchNorm": (functools.partial(pnn.FieldBatchNorm, 2, MIXED), nonlinearities.FieldBatchNorm(MIXED),
                       normal(4, 3, 3, 2, 3)),
    "FieldNorm": (functools.partial(pnn.FieldNorm, 4, MIXED, num_groups=2), nonlinearities.FieldNorm(MIXED, 2),
                  normal(2, 3, 3, 4, 3)),
    "GroupDropout": (functools.partial(pnn.GroupDropout, 0.5, P4), pdo.GroupDropout(0.5, P4), normal(2, 5, 5, 2, 4)),
    "NormNonlinearity": (functools.partial(pnn.NormNonlinearity, 2, MIXED, bias_init=nn.initializers.ones),
                         nonlinearities.NormNonlinearity(MIXED, bias_init=nn.initializers.ones), normal(2, 3, 3, 2, 3)),
    "GatedNonlinearity": (lambda rngs: pnn.GatedNonlinearity(VECTOR), GATED, normal(2, 3, 3, 2, GATED.in_rep.dim)),
    "MnistRotNet": (functools.partial(pnn.networks.MnistRotNet, **MNIST), pdo.networks.MnistRotNet(**MNIST),
                    normal(2, 28, 28, 1)),
    "ResNet": (functools.partial(pnn.networks.ResNet, 2, **RESNET), pdo.networks.ResNet(**RESNET), normal(2, 8, 8, 2)),
    "UNet": (functools.partial(pnn.networks.UNet, 2, FLIP, (1, 2), 3, periodic=True, blocks=1),
             pdo.networks.UNet(FLIP, (1, 2), 3, periodic=True, blocks=1), normal(2, 8, 6, 2)),
    "UNet of fields": (functools.partial(pnn.networks.UNet, 2, LINE, [1, 2], VALUES, in_rep=VALUES, blocks=1),
                       pdo.networks.UNet(LINE, (1, 2), VALUES, VALUES, blocks=1), normal(2, 7, 2, 1)),
}
each = pytest.mark.parametrize("name", CASES)
TOLD = {  # those that are told whether they train, and what it changes
    "GroupBatchNorm": {"mean", "var"}, "GroupBatchNorm, scalars": {"mean", "var"}, "FieldBatchNorm": {"mean", "var", "square"},
    "GroupDropout": {"count"}, "MnistRotNet": {"mean", "var", "count"}, "ResNet": {"mean", "var"},
    "UNet": {"mean", "var"}, "UNet of fields": {"mean", "var"}}


def told(name, train):
    """What linen's call takes beside the input."""
    return [train] if name in TOLD else []


@functools.cache
def made(name):
    """The face, made under jit, which must not matter and here is quicker."""
    make = lambda: CASES[name][0](rngs=nnx.Rngs(params=0, dropout=1))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(make)), jit(lambda: nnx.state(make()))())


def assert_same(found, expected, tolerance=0.0):
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)


def state(module):
    """All that a module holds, keys as numbers."""
    return jax.tree.map(lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a,
                        nnx.to_pure_dict(nnx.state(module)))


def changes(before, after):
    """The names of what is not the same in two states."""
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    return {path[-1].key for path, value in jax.tree.leaves_with_path(same) if not value}


@each
def test_variables_are_those_of_linen(name):
    """A face made with a key has the names, shapes and values that linen's init with this key gives."""
    module, x = CASES[name][1:]
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    variables = jit(lambda: module.lazy_init(nnx.Rngs(params=0).params(), shape, *told(name, False)))()
    assert made(name).to_linen()[0] == module
    assert_same(made(name).to_linen()[1], variables)


@each
@pytest.mark.parametrize("train", [True, False])
def test_outputs_and_statistics_are_those_of_linen(name, train):
    """In training, with linen given the key that comes next, and in evaluation, where nothing changes."""
    face, (_, module, x) = nnx.clone(made(name)), CASES[name]
    (face.train if train else face.eval)()
    keys = {"dropout": nnx.clone(face).rngs()} if "rngs" in vars(face) else {}
    first, (graphdef, held) = state(face), nnx.split(face)

    @jit
    def run(held, variables, x):
        face = nnx.merge(graphdef, held)
        y, changed = module.apply(variables, x, *told(name, train), mutable="batch_stats", rngs=keys)
        return (face(x), face.to_linen()[1]), (y, variables | changed), nnx.state(face)

    found, expected, after = run(held, face.to_linen()[1], x)
    assert_same(found, expected, 1e-6)
    nnx.update(face, after)
    assert changes(first, state(face)) == (TOLD.get(name, set()) if train else set())


def test_what_a_call_takes_beside_its_input():
    """A mask goes to linen; ``train`` goes before the attributes, for this call."""
    face, (_, module, x) = nnx.clone(made("GroupBatchNorm")), CASES["GroupBatchNorm"]
    mask = jnp.arange(9).reshape(3, 3) > 3
    expected, changed = module.apply(face.to_linen()[1], x, train=True, mask=mask, mutable="batch_stats")
    first = state(face)
    face(x, train=False)
    assert changes(first, state(face)) == set()
    assert_same((face(x, mask=mask), face.to_linen()[1]["batch_stats"]), (expected, changed["batch_stats"]))


def test_fields_are_read_from_the_face():
    """Fields of the linen module, properties too; a variable comes before a field of its name; nothing else is invented."""
    face = made("MnistRotNet")
    assert (face.group, face.features, made("GatedNonlinearity").in_rep.dim) == (FLIP, 1, 3)
    assert isinstance(face.head.kernel, nnx.Param) and face.linen.head == "invariant"
    assert isinstance(face.norm1.mean, nnx.BatchStat)
    assert not [name for name in ("nothing", "conv9", "init", "apply", "_private") if hasattr(face, name)]
    assert not hasattr(made("GroupConv"), "use_running_average") and not hasattr(made("GroupBatchNorm"), "deterministic")


CLASSES = [value for module in (pnn, pnn.networks) for value in vars(module).values()
           if inspect.isclass(value) and issubclass(value, pnn.Face) and value is not pnn.Face]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_signatures_tell_what_can_be_set(cls):
    """inspect and help show every field of the linen module that the docstring names."""
    linen = functools.reduce(getattr, re.match(r":class:`pdo_jax\.([\w.]+)`", cls.__doc__).group(1).split("."), pdo)
    assert linen.__name__ == cls.__name__
    assert inspect.signature(linen).parameters.keys() - {"parent", "name"} <= inspect.signature(cls).parameters.keys()
    assert not {"self", "options"} & inspect.signature(cls).parameters.keys()


def test_every_layer_and_network_has_a_face():
    """What is a linen module in the public surface is a class of pnn too."""
    public = [value for module in (pdo, pdo.nonlinearities, pdo.networks) for name, value in vars(module).items()
              if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__.startswith("pdo_jax")
              and not name.startswith("_")]
    assert {cls.__name__ for cls in public} - {"Frozen", "Normalised"} == {cls.__name__ for cls in CLASSES}


# Training and the transformations of nnx.


def test_the_page_runs():
    """docs/nnx.ipynb: its loop learns, and moves all parameters, statistics and keys; then evaluation is invariant and changes
    nothing, and the network is exported as the page says."""
    cells = json.loads((Path(__file__).parent.parent / "docs" / "nnx.ipynb").read_text())["cells"]
    _, loop, _, export = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = {"__name__": "page"}
    exec(compile(loop, "docs/nnx.ipynb", "exec"), found)
    net, infer, images = found["net"], found["infer"], found["images"]
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert changes(state(found["Net"](P4, rngs=nnx.Rngs(0))), state(net)) == {"kernel", "bias", "scale", "mean", "var", "count"}
    before = state(net)
    assert_same(infer(net, jnp.rot90(images, axes=(1, 2))), infer(net, images), 1e-4)
    assert changes(before, state(net)) == set()
    exec(compile(export, "docs/nnx.ipynb", "exec"), found)
    assert found["program"].out_avals[0].shape == (64, 2)


def sequence(seed):
    """Something of everything, quick to run."""
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(pnn.GroupBatchNorm(2, P4, rngs=rngs), nnx.relu, pnn.GroupDropout(0.5, P4, rngs=rngs),
                          functools.partial(pdo.max_pool, group=P4), pnn.GroupConv(2, 2, P4, kernel_size=1, rngs=rngs))


X = normal(4, 2, 2, 2, 4)


def test_modes_copies_and_views():
    """train and eval reach every norm and dropout; views share variables, copies share nothing."""
    net = sequence(0)
    modes = lambda net: (net.layers[0].use_running_average, net.layers[2].deterministic)
    view = nnx.view(net, deterministic=True, use_running_average=True)
    copies = [copy.deepcopy(net), nnx.clone(net)]
    assert (modes(net), modes(view)) == ((False, False), (True, True))
    first = state(net)
    net(X)
    assert changes(first, state(net)) == changes(first, state(view)) == {"mean", "var", "count"}
    for each in copies:
        assert changes(first, state(each)) == set()
    net.eval()
    assert "use_running_average: bool | None" in nnx.view_info(net)
    assert modes(net) == (True, True) and modes(copies[0]) == (False, False)
    assert_same(view(X), net(X))
    net.train()
    assert modes(net) == (False, False)
    assert "kernel:" in nnx.tabulate(net, X)


def test_stacked_layers():
    """vmap over the constructor makes layers side by side; vmap, scan and remat over them do what a loop does."""
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return pnn.GroupConv(2, 2, FLIP, kernel_size=3, rngs=rngs)

    layers, x = nnx.jit(make)(nnx.Rngs(0)), normal(2, 4, 4, 2, 2)
    kernel = layers.kernel[...]
    assert kernel.shape[0] == 3 and jnp.unique(kernel).size == kernel.size
    graphdef, held = nnx.split(layers)
    scanned = nnx.scan(nnx.remat(lambda x, layer: jnp.tanh(layer(x))), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    side = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))

    def each(layers):
        graphdef, held = nnx.split(layers)
        return [nnx.merge(graphdef, jax.tree.map(lambda a, k=k: a[k], held)) for k in range(3)]

    def looped(x, layers):
        return functools.reduce(lambda x, layer: jnp.tanh(layer(x)), each(layers), x)

    @jit
    def run(held, x):
        layers = nnx.merge(graphdef, held)
        value, gradient = (
            [way(lambda layers, f=f: f(x, layers).sum())(layers) for f in (scanned, looped)] for way in (lambda f: f, nnx.grad))
        return *zip(value, gradient, strict=True), side(layers, x), jnp.stack([layer(x) for layer in each(layers)])

    (found, expected, *both) = run(held, x)
    assert_same((found, both[0]), (expected, both[1]), 1e-5)


def test_a_training_step_is_the_program_of_linen():
    """The step of a face is made of the operations, each as often, that make the step of its linen module."""
    face, (_, module, x) = nnx.clone(made("ResNet")), CASES["ResNet"]
    labels, tx, variables = jnp.arange(2), optax.sgd(0.1, 0.9), face.to_linen()[1]
    loss = lambda net, x: optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()
    optimizer = nnx.Optimizer(face, tx, wrt=nnx.Param)

    def step(face, optimizer, x):
        value, gradients = nnx.value_and_grad(loss)(face, x)
        optimizer.update(face, gradients)
        return value

    def linen_step(variables, opt_state, x):
        def linen_loss(params):
            y, changed = module.apply(variables | {"params": params}, x, train=True, mutable="batch_stats")
            return loss(lambda x: y, x), changed

        (value, changed), gradients = jax.value_and_grad(linen_loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(gradients, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **changed}, opt_state, value

    ours, theirs = (collections.Counter(re.findall(r" = \"?([\w.]+)", lowered.as_text())) for lowered in (
        nnx.jit(step).lower(face, optimizer, x), jax.jit(linen_step).lower(variables, tx.init(variables["params"]), x)))
    assert theirs["stablehlo.dot_general"] > 5 and theirs.total() > 500
    assert not theirs - ours and (ours - theirs).keys() <= {"stablehlo.add", "stablehlo.constant", "result"}, ours - theirs
    assert (ours - theirs).total() <= 3  # nnx.Optimizer counts its steps


def test_state_through_orbax(tmp_path):
    """Saved by Orbax and restored into shapes alone, a network holds the same, and goes on with the same keys."""
    ocp = pytest.importorskip("orbax.checkpoint")

    net = sequence(3)
    net(X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "net", nnx.state(net))
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: sequence(0)))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "net", shapes))
    assert_same(state(restored), state(net))
    assert_same(restored(X), net(X))


# Between the two APIs.


def test_linen_there_and_back(tmp_path):
    """Module and variables come back as they were given; export and save take what to_linen gives."""
    face = pnn.load_pretrained("mnist_rot_best")
    network, variables = pdo.networks.load_pretrained("mnist_rot_best")
    assert face.to_linen()[0] == network and face.use_running_average and "rngs" not in vars(face)
    assert_same(face.to_linen()[1], jax.tree.map(jnp.asarray, variables))
    again = pnn.from_linen(*face.to_linen(), rngs=nnx.Rngs(0))
    assert again.deterministic is False and again.use_running_average is False
    path = tmp_path / "net.safetensors"
    pdo.export.save(path, *again.to_linen())
    assert_same(pnn.from_linen(*pdo.export.load(path)).to_linen()[1], face.to_linen()[1])

    face, x = nnx.clone(made("MnistRotNet")), CASES["MnistRotNet"][2]
    face.eval()
    plain, folded = pdo.export.to_plain(*face.to_linen(), x.shape)
    graphdef, held = nnx.split(face)
    found, expected = jit(lambda folded, held, x: (plain.apply(folded, x), nnx.merge(graphdef, held)(x)))(folded, held, x)
    assert_same(found, expected, 1e-5)


def test_errors():
    """They name what was given and what to do."""
    for features in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"into GroupConv must be an int >= 1, got {features}"):
            pnn.GroupConv(features, 2, P4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="paddings"):
        pnn.GroupConv(1, 2, P4, paddings=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="of PDOConv must be a Representation"):
        pnn.PDOConv(1, 2, P4, VECTOR, rngs=nnx.Rngs(0))
    module = nn.Sequential([pdo.GroupBatchNorm(P4, use_running_average=False)])
    with pytest.raises(ValueError, match="Sequential has batch statistics, but no argument train.*nnx.Sequential"):
        pnn.from_linen(module, module.lazy_init(jax.random.key(0), jnp.ones((1, 2, 2, 1))))
    with pytest.raises(ValueError, match="Sequential is static in nnx.*tuples for lists"):
        pnn.from_linen(nn.Sequential([pdo.LiftingConv(1, P4)]), {})
    face = nnx.clone(made("MnistRotNet"))
    face.deterministic = True
    with pytest.raises(ValueError, match="MnistRotNet is told by one train.*'deterministic': True.*alike"):
        face(jnp.ones((1, 28, 28, 1)))
