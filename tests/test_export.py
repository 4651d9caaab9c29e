"""Export: folded networks compute what the network computes, as plain convolutions and as programs for every platform."""

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params
from quick import jit

import pdo_jax as pdo
from pdo_jax import fields, groups, nonlinearities
from pdo_jax.export import about, from_stablehlo, to_onnx, to_plain, to_stablehlo
from pdo_jax.networks import PAPER, MnistRotNet, ResNet, UNet

P4, P8, LINE, ROCK = groups.cyclic(4), groups.cyclic(8), groups.reflection(1), groups.tetrahedral()
REGULAR, VECTOR = fields.regular(P4), fields.standard(P4)
SMALL = dict(features=2, head_features=3)
RESNET = functools.partial(ResNet, widths=(2, 3, 4), blocks=1, group=P4, kernel_size=3)


class Net(nn.Module):
    """A network from a function of a module's inside."""

    body: Callable

    @nn.compact
    def __call__(self, x, train: bool = False):
        return self.body(x, train)


class Steerable(nn.Module):
    """Fields of two types, with norms per block; takes no ``train``."""

    @nn.compact
    def __call__(self, x):
        both = fields.direct_sum([REGULAR, VECTOR])
        x = pdo.PDOConv(2, fields.trivial(P4), both, kernel_size=3)(x[..., None])
        x = nonlinearities.FieldBatchNorm(both)(x, train=False)
        x = nonlinearities.NormNonlinearity(both)(x)
        x = pdo.PDOConv(3, both, REGULAR, kernel_size=3, strides=2, padding="CIRCULAR", use_bias=True)(x)
        return nn.relu(pdo.GroupBatchNorm(P4)(x, False))


def line(x, train):
    for layer, padding in enumerate(["CIRCULAR", "VALID", ((1, 2),), 0]):
        conv = pdo.GroupConv if layer else pdo.LiftingConv
        x = conv(2, LINE, strides=1 + layer % 2, padding=padding, use_bias=True, basis=2)(x)
        x = nn.silu(pdo.GroupBatchNorm(LINE)(x, train=train))
    return x


def rock(x, train):
    x = pdo.LiftingConv(2, ROCK, kernel_size=3)(x)
    return pdo.GroupConv(2, ROCK, kernel_size=1, strides=(1, 2, 1))(nn.relu(pdo.GroupBatchNorm(ROCK)(x, train)))


def reused(x, train):
    """One convolution before one norm, twice: merged. Another convolution and norm, each with a second partner: not."""
    lift = pdo.LiftingConv(2, P4, kernel_size=3, frame=0.3, name="lift")(x)
    conv, norm = pdo.GroupConv(2, P4, kernel_size=3, name="conv"), pdo.GroupBatchNorm(P4, name="norm")
    x = nn.relu(norm(conv(nn.relu(norm(conv(lift), train))), train)) + lift
    other = pdo.GroupBatchNorm(P4, name="other")
    x = other(pdo.GroupConv(2, P4, kernel_size=1, name="one")(x), train)
    return nn.relu(other(nn.relu(pdo.GroupConv(2, P4, kernel_size=1, name="two")(x)), train))


def shared(x, train):
    """A norm of two convolutions: merged into both. A convolution whose output is also a result: its norm stays."""
    lift, norm = pdo.LiftingConv(2, P4, kernel_size=3, name="lift"), pdo.GroupBatchNorm(P4, name="norm")
    x = norm(pdo.GroupConv(2, P4, kernel_size=1, name="conv")(norm(lift(x), train)), train)
    y = pdo.GroupConv(2, P4, kernel_size=1, name="last")(x)
    return y, pdo.GroupBatchNorm(P4, name="alone")(y, train)


def remat(x, train):
    """Programs within the program: in one block the norm is merged, in the other its input is added to its output."""
    block = nn.remat(Net, static_argnums=(2,))

    def added(x, train):
        y = pdo.GroupConv(2, P4, kernel_size=1)(x)
        return pdo.GroupBatchNorm(P4)(y, train) + y

    x = block(lambda x, train: nn.relu(pdo.GroupBatchNorm(P4)(pdo.LiftingConv(2, P4, kernel_size=3)(x), train)))(x, train)
    return block(added)(x, train)


NETWORKS = {  # name: network, shape of the input, convolutions, norms that are not merged
    "mnist, invariant": (MnistRotNet(**SMALL, group=P4), (2, 28, 28, 1), 7, 0),
    "mnist, ranks": (MnistRotNet(**SMALL, group=P4, ranks=(3, 2)), (2, 28, 28, 1), 7, 0),
    "mnist, paper": (PAPER["mnist_rot"](**SMALL), (2, 28, 28, 1), 6, 0),
    "resnet, stride": (RESNET(), (2, 8, 8, 3), 9, 4),  # what these four take goes to the shortcut or was added up
    "resnet, pool": (RESNET(downsample="pool", invariant=True), (2, 8, 8, 3), 9, 4),
    "steerable": (Steerable(), (2, 6, 6, 2), 2, 2),
    "line": (Net(line), (2, 30, 3), 4, 0),
    "rock": (Net(rock), (2, 4, 4, 3, 1), 2, 0),
    "reused": (Net(reused), (2, 6, 6, 1), 4, 1),
    "shared": (Net(shared), (2, 5, 5, 2), 3, 1),
    "remat": (Net(remat), (2, 5, 5, 2), 2, 1),
    "one layer": (pdo.LiftingConv(2, P8, use_bias=True), (2, 6, 6, 1), 1, 0),
    "sequence": (nn.Sequential([
        pdo.LiftingConv(2, P4), pdo.GroupBatchNorm(P4, use_running_average=True), nn.relu,
        pdo.GroupDropout(0.5, P4, deterministic=True), pdo.GroupConv(2, P4), functools.partial(pdo.max_pool, group=P4),
        pdo.GroupBatchNorm(P4, use_running_average=True)]), (2, 6, 6, 1), 2, 1),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
ONNX = {"p6": (PAPER["p6"](blocks=1), (2, 32, 32, 3)), "unet": (UNet(P4, widths=(2, 3), out=2), (2, 9, 8, 1)),
        "options": (nn.Sequential([
            pdo.LiftingConv(2, P4, (5, 3), padding="REFLECT", basis=1, spacing=(1, 2)), pdo.nonlinearities.FieldNorm(P4),
            pdo.GroupConv(2, P4, 3, kernel_dilation=2, feature_group_count=2, padding="EDGE"),
            functools.partial(pdo.upsample, group=P4), functools.partial(pdo.adaptive_pool, group=P4, sizes=3)]), (2, 7, 8, 1))}


@functools.cache
def trained(name, **fields):
    """(network, input, variables that are not the initial ones, as after training)."""
    network, shape = (NETWORKS | ONNX)[name][:2]
    network, random = network.clone(**fields), np.random.default_rng(1)
    x = random.normal(size=shape).astype(np.float32)

    def draw(path, p):
        if path[-1].key in ("scale", "var", "square"):
            return random.uniform(0.5, 1.5, p.shape).astype(p.dtype)
        return (random.normal(size=p.shape) / np.sqrt(np.prod(p.shape[:-1]))).astype(p.dtype)

    return network, x, jax.tree.map_with_path(draw, jax.eval_shape(network.init, jax.random.key(0), x))


def infer(network, variables, x):
    takes_train = isinstance(network, Net | MnistRotNet | ResNet | UNet)
    return jit(lambda variables, x: network.apply(variables, x, **{"train": False} if takes_train else {}))(variables, x)


def assert_close(given, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


# Plain convolutions.


@each_network
def test_outputs_of_the_folded_network(name):
    """plain.apply(plain_variables, x) = network.apply(variables, x, train=False), and nothing that was given changes."""
    network, x, variables = trained(name)
    before = jax.tree.map(np.copy, variables)
    plain, folded = to_plain(network, variables, x.shape)
    for way in (plain, plain.clone(lowering="auto")):
        assert_close(jit(way.apply)(folded, x), infer(network, variables, x))
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, before))
    assert to_plain(plain, folded, x.shape) == (plain, folded)


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jaxprs_in_params(eqn.params):
            yield from primitives(inner)


@each_network
def test_a_layer_becomes_one_convolution(name):
    """One convolution a layer, no product beside those of linear heads, and kernels, biases and scales as only parameters."""
    network, x, variables = trained(name)
    plain, folded = to_plain(network, variables, x.shape)
    used, modules = list(primitives(jax.make_jaxpr(plain.apply)(folded, x).jaxpr)), {}
    for path, p in flatten_dict(folded["params"]).items():
        modules.setdefault(path[:-1], {})[path[-1]] = p
    kinds = [(*sorted(m), m["kernel"].ndim if "kernel" in m else 0) for m in modules.values()]
    convolutions, norms = NETWORKS[name][2:]
    assert kinds.count(("bias", "kernel", x.ndim)) == convolutions
    assert sum("scale" in kind for kind in kinds) == norms
    assert used.count("conv_general_dilated") == convolutions + (name == "reused")  # which calls one of them twice
    assert used.count("dot_general") == sum(kind[-1] == 2 for kind in kinds)
    assert "batch_stats" not in folded or name == "steerable"  # for the norm of vectors, which is not folded


def test_what_computes_a_folded_layer():
    """With lowering "auto" on a CPU no convolution at all; elsewhere one, with the kernel as it is."""
    network, x, variables = trained("one layer")
    plain, folded = to_plain(network, variables, x.shape)
    auto = jax.jit(plain.clone(lowering="auto").apply).trace(folded, x)
    assert "stablehlo.convolution" not in auto.lower(lowering_platforms=("cpu",)).as_text()
    text = auto.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 1 and "stablehlo.dot_general" not in text


def test_names_and_values_of_plain_parameters():
    """Under the layer's path; the bias of a merged norm is shift = bias - mean · factor for every component of a channel."""
    network, x, variables = trained("mnist, paper")
    plain, folded = to_plain(network, variables, x.shape)
    assert set(folded["params"]) == {*(f"conv{k}" for k in range(1, 7)), "head"}
    norm, stats = variables["params"]["norm2"], variables["batch_stats"]["norm2"]
    factor = norm["scale"] / np.sqrt(stats["var"] + 1e-5)
    kernel, bias = folded["params"]["conv2"]["kernel"], folded["params"]["conv2"]["bias"]
    assert kernel.shape == (5, 5, 2 * 8, 2 * 8)
    np.testing.assert_allclose(bias, np.repeat(norm["bias"] - stats["mean"] * factor, 8), rtol=1e-5)


@pytest.mark.parametrize("name", ["mnist, invariant", "resnet, stride"])
def test_bfloat16(name):
    """The computation keeps the network's type; what is merged is merged in float32."""
    network, x, variables = trained(name, dtype=jnp.bfloat16)
    plain, folded = to_plain(network, variables, x.shape)
    assert {p.dtype for p in jax.tree.leaves(folded)} == {jnp.dtype("float32")}
    assert "bf16" in jax.jit(plain.apply).lower(folded, x).as_text()
    assert_close(jit(plain.apply)(folded, x), infer(network, variables, x), 2e-2)


def test_the_dtype_of_the_input_counts():
    """Layers without a dtype compute in that of their input, and whole numbers in float32, folded or not."""
    network, x, variables = trained("rock")
    plain, folded = to_plain(network, variables, x.shape)
    for dtype in (jnp.bfloat16, jnp.int32):
        y = jnp.asarray(x * 3, dtype)
        assert_close(jit(plain.apply)(folded, y), infer(network, variables, y), 2e-2)


def test_a_subclass_with_a_call_of_its_own_stays_as_it_is():
    """What it does is not known, so it keeps its parameters and gives the same numbers."""

    class Twice(pdo.GroupConv):
        def __call__(self, x):
            return 2 * super().__call__(x)

    network = nn.Sequential([pdo.LiftingConv(2, P4, kernel_size=3), Twice(2, P4, kernel_size=3)])
    variables = jit(network.init)(jax.random.key(0), x := trained("one layer")[1])
    plain, folded = to_plain(network, variables, x.shape)
    assert folded["params"]["layers_1"]["kernel"] is variables["params"]["layers_1"]["kernel"]
    for function in (lambda x: jit(plain.apply)(folded, x), from_stablehlo(to_stablehlo(network, variables, x.shape))):
        assert_close(function(x), infer(network, variables, x))


def test_errors_of_folding():
    """They name the layer and what to do."""
    network, x, variables = trained("mnist, paper")
    with pytest.raises(ValueError, match=r"all collections.*got \['conv1', 'conv2'"):
        to_plain(network, variables["params"], x.shape)
    plain, _ = to_plain(network, variables, x.shape)
    with pytest.raises(ValueError, match=r"conv1 takes a plain kernel, of shape \(5, 5, 1\).*got \(9, 1, 1, 2\).*to_plain"):
        plain.apply(variables, x)
    _, x, variables = trained("one layer")
    plain, folded = to_plain(NETWORKS["one layer"][0].clone(padding="VALID"), variables, x.shape)
    with pytest.raises(ValueError, match=r"a kernel of size 5 does not fit an input of shape \(4, 6\)"):
        plain.apply(folded, x[:, 2:])

    always = Net(lambda x, train: pdo.GroupBatchNorm(P4, name="norm")(pdo.LiftingConv(1, P4)(x), True))
    variables = jit(always.init)(jax.random.key(0), x)
    with pytest.raises(ValueError, match="norm takes the statistics of its batch at inference"):
        to_plain(always, variables, x.shape)

    mapped = nn.vmap(pdo.LiftingConv, variable_axes={"params": 0}, split_rngs={"params": True})(1, P4)
    variables = jit(mapped.init)(jax.random.key(0), x[None])
    with pytest.raises(ValueError, match=r"kernel of shape \(1, 9, 1, 1, 1\).*nn.vmap.*in a Python loop"):
        to_plain(mapped, variables, x[None].shape)


# Programs.


@pytest.mark.parametrize("name", ["mnist, invariant", "resnet, stride", "steerable"])
def test_round_trip_through_bytes(name):
    """The program that is read back takes inputs alone and gives the network's outputs; it says which versions wrote it."""
    network, x, variables = trained(name)
    data = to_stablehlo(network, variables, x.shape)
    assert isinstance(data, bytes)
    assert_close(from_stablehlo(data)(x), infer(network, variables, x))
    program = jax.export.deserialize(bytearray(data))
    assert [(v.shape, v.dtype) for v in program.in_avals] == [(x.shape, x.dtype)]
    assert "stablehlo.convolution" in program.mlir_module()  # for platforms other than a CPU
    assert about(data) == {
        "pdo_jax": pdo.__version__, "jax": jax.__version__, "calling_convention": program.calling_convention_version,
        "platforms": ["cpu", "cuda", "rocm", "tpu"], "shape": list(x.shape), "dtype": "float32"}


@pytest.mark.parametrize("name", ["reused", "mnist, paper", "resnet, stride"])
def test_any_batch(name):
    """Batch None is a program for every batch size."""
    network, x, variables = trained(name)
    function = from_stablehlo(to_stablehlo(network, variables, (None, *x.shape[1:]), platforms=["cpu"]))
    for batch in (1, 2):
        assert_close(function(x[:batch]), infer(network, variables, x[:batch]))


def test_a_network_that_needs_its_batch_as_a_number_says_so():
    _, x, _ = trained("reused")
    counting = Net(lambda x, train: pdo.LiftingConv(1, P4)(x).reshape(len(x), -1))
    with pytest.raises(ValueError, match="Net needs its batch as a number.*give one in shape"):
        to_stablehlo(counting, jit(counting.init)(jax.random.key(0), x), (None, *x.shape[1:]))


def test_errors_of_files():
    """Another file, a cut one, a changed one, one of a version to come, a platform that is none."""
    network, x, variables = trained("one layer")
    data = to_stablehlo(network, variables, x.shape, platforms=("tpu",))
    assert about(data)["platforms"] == ["tpu"]
    for other in (b"", b"some text", data[:200], jax.export.export(jax.jit(jnp.sin))(x).serialize()):
        with pytest.raises(ValueError, match=r"expected a file of pdo_jax.export.to_stablehlo.*, got \d+ bytes"):
            from_stablehlo(other)
    for changed in (data[:-1], b"x" + data[1:], data.replace(b'"jax"', b'"JAX"')):
        with pytest.raises(ValueError, match="damaged: .*write it anew"):
            from_stablehlo(changed)
    with pytest.raises(ValueError, match="platforms must be some of .*'rocm'.*got 'gpu'"):
        to_stablehlo(network, variables, x.shape, platforms="gpu")


def test_a_file_of_another_calling_convention(monkeypatch):
    """It is refused with both versions, before jax looks at it."""
    network, x, variables = trained("one layer")
    data = to_stablehlo(network, variables, x.shape)
    monkeypatch.setattr(jax.export, "minimum_supported_calling_convention_version", 98)
    monkeypatch.setattr(jax.export, "maximum_supported_calling_convention_version", 99)
    with pytest.raises(ValueError, match=r"calling convention \d+; jax .* reads 98 to 99: write it again"):
        from_stablehlo(data)


# ONNX, where the extra of this name is installed.


def in_onnxruntime(data):
    """The function of a batch in an ONNX model; first result only."""
    session = pytest.importorskip("onnxruntime", reason="needs the extra onnx").InferenceSession(data)
    return lambda x: session.run(None, {"x": x})[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the converter's own
@pytest.mark.parametrize("name", ["mnist, invariant", "mnist, paper", "steerable", "line", "resnet, pool", *ONNX])
def test_onnx(name):
    """onnxruntime gives the network's outputs, from one file for every batch."""
    pytest.importorskip("jax2onnx", reason="needs the extra onnx")
    network, x, variables = trained(name)
    function = in_onnxruntime(to_onnx(*to_plain(network, variables, x.shape), (None, *x.shape[1:])))
    for batch in (1, 2):
        assert_close(function(x[:batch]), infer(network, variables, x[:batch]))


@pytest.mark.parametrize("function, package, extra", [(to_stablehlo, "flatbuffers", "export"), (to_onnx, "jax2onnx", "onnx")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, function, package, extra):
    network, x, variables = trained("rock")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}.*pip install "pdo_jax\[{extra}\]"'):
        function(network, variables, x.shape)


def test_errors_of_onnx():
    """What the converter lacks, and a type that few runtimes have, with the remedy."""
    network, x, variables = trained("rock")
    pytest.importorskip("jax2onnx", reason="needs the extra onnx")
    with pytest.raises(ValueError, match="cannot convert Net for inputs .*to_stablehlo"):
        to_onnx(network, variables, x.shape)
    network, x, variables = trained("mnist, paper", dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="computes in bfloat16.*clone"):
        to_onnx(network, variables, x.shape)


@pytest.mark.parametrize("name", ["mnist, invariant", "resnet, stride"])
def test_networks_lower_for_every_accelerator(name):
    """Forward and training step of the modules themselves, for CUDA, ROCm and TPU, on a host that has none."""
    network, x, variables = trained(name)

    def gradient(variables, x, key):
        def loss(params):
            logits, new = network.apply({**variables, "params": params}, x, train=True, mutable="batch_stats",
                                        rngs={"dropout": key})
            return (logits ** 2).sum(), new

        return jax.grad(loss, has_aux=True)(variables["params"])

    for function, arguments in ((network.apply, (variables, x)), (gradient, (variables, x, jax.random.key(0)))):
        program = jax.export.export(jax.jit(function), platforms=("cuda", "rocm", "tpu"))(*arguments)
        assert program.platforms == ("cuda", "rocm", "tpu")
        assert program.mlir_module().count("stablehlo.convolution") >= NETWORKS[name][2]
