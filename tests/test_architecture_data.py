"""Networks as data: what is written is built again, exactly; what differs is named; and hostile data builds nothing."""

import builtins
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import pdo_jax as pdo
from experiments.baselines import MnistRotCNN, ResNetCNN
from experiments.volumes import VolumeCNN, VolumeNet
from pdo_jax import fields, groups, networks, stencils
from pdo_jax.architecture import differences, from_data, to_data
from pdo_jax.nonlinearities import FieldBatchNorm, GatedNonlinearity, NormNonlinearity

ICOSAHEDRAL = groups.icosahedral()


class Block(nn.Module):
    """A module with fields of every kind that there is."""

    act: object = nn.relu
    conv: object = nn.Conv
    inner: object = None
    table: object = None

    @nn.compact
    def __call__(self, x):
        return self.act(x if self.inner is None else self.inner(x))


SHARED = nn.Dense(2)
MODULES = {
    "mnist": networks.MnistRotNet(),
    "mnist tapered": networks.MnistRotNet(features=(1, 2, 3, 1, 4, 2)),
    "mnist paper": networks.MnistRotNet(
        head="paper", scheme=functools.partial(stencils.gaussian_derivative, sigma=1.1), dtype=jnp.bfloat16, axis_name="data"
    ),
    **{name: network() for name, network in networks.PAPER.items()},
    "resnet 3-D": networks.ResNet(
        group=groups.octahedral(reflections=True),
        widths=(1, 2, 3),
        scheme=stencils.rbf_fd,
        basis=2,
        frame=groups.icosahedral().elements[7],
    ),
    "volumes": VolumeNet(ICOSAHEDRAL, (1, 2, 3), 4),
    "volumes cnn": VolumeCNN([1, 2, 3], 4),
    "cnn": MnistRotCNN(dropout=0.0),
    "resnet cnn": ResNetCNN(2, widths=(4, 8)),
    "lifting": pdo.LiftingConv(2, groups.reflection(1), padding=((1, 0),), param_dtype=jnp.float16),
    "steerable": pdo.PDOConv(3, fields.standard(ICOSAHEDRAL), fields.regular(ICOSAHEDRAL), kernel_init=nn.initializers.zeros),
    "band": pdo.PDOConv(3, fields.band_limited(groups.dihedral(9), 2), fields.trivial(groups.dihedral(9))),
    "irrep": NormNonlinearity(fields.irreps(groups.cyclic(5))[1]),
    "gate": GatedNonlinearity(fields.standard(groups.cyclic(3))),
    "field norm": FieldBatchNorm(fields.quotient(groups.octahedral(), groups.tetrahedral())),
    "sequential": nn.Sequential([nn.Dense(3, name="first"), jnp.tanh, functools.partial(nn.max_pool, window_shape=(2, 2))]),
    "kinds": Block(
        jax.nn.gelu,
        functools.partial(nn.Conv, use_bias=False, dtype=np.float16),
        nn.Sequential([SHARED, SHARED]),
        {
            "a": [1, -0.0, 1e-300, float("inf")],
            3: (None, True, "text"),
            "w": np.arange(4, dtype=np.int8).reshape(2, 2),
            "b": jnp.bfloat16(0.1),
            "d": jnp.bool_,
        },
    ),
}


def groups_of(value):
    """All groups and matrices that a module holds, in order."""
    if isinstance(value, groups.Group):
        return [value.elements, value.table, value.inverse]
    if isinstance(value, fields.Representation):
        return [value.matrices, *groups_of(value.group)]
    if isinstance(value, nn.Module):
        return [array for field in vars(value).values() for array in groups_of(field)]
    return [value] if isinstance(value, np.ndarray) else []


@pytest.mark.parametrize("name", MODULES)
def test_a_network_is_written_and_built_again(name):
    """Through JSON text; to equal data and, bit for bit, to equal groups, representations and arrays."""
    network = MODULES[name]
    data = json.loads(json.dumps(to_data(network), allow_nan=False))
    built = from_data(data)
    assert type(built) is type(network) and to_data(built) == data and differences(network, built) == []
    arrays = list(zip(groups_of(network), groups_of(built), strict=True))
    assert all(a.dtype == b.dtype and a.tobytes() == np.ascontiguousarray(b).tobytes() for a, b in arrays)
    if name in ("mnist", "p6m", "p8_wide", "cnn", "steerable", "gate"):  # partial objects, for one, are never equal
        assert built == network


def test_a_built_network_computes_the_same():
    smooth = functools.partial(stencils.gaussian_derivative, sigma=1)
    network = pdo.LiftingConv(2, groups.cyclic(3), frame=0.3, scheme=smooth, lowering="dense")
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 1))
    variables = network.init(jax.random.key(1), x)
    np.testing.assert_array_equal(network.apply(variables, x), from_data(to_data(network)).apply(variables, x))


def test_one_module_in_two_places_stays_one():
    """Shared parameters stay shared."""
    network = nn.Sequential([SHARED, nn.relu, SHARED])
    built = from_data(to_data(network))
    assert built.layers[0] is built.layers[2]
    shapes = [jax.eval_shape(n.init, jax.random.key(0), jnp.ones((1, 2))) for n in (network, built)]
    assert flatten_dict(shapes[0]) == flatten_dict(shapes[1]) and len(flatten_dict(shapes[0])) == 2


class Custom(nn.Module):
    """With a default that only a call makes."""

    init: object = nn.initializers.lecun_normal()


def test_a_default_that_has_no_name_stays_the_default():
    assert from_data(to_data(Custom())).init is Custom.init


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            Block(act=lambda x: x),
            r"Block.act is <function <lambda>.* under no name .*: define it in a module that can be imported",
        ),
        (Block(inner=Block(table=[1, functools.partial(lambda x: x)])), r"Block.inner.table\[1\] is <function <lambda>"),
        (Block(act=type("Local", (nn.Module,), {})()), "Block.act is <class '.*Local'>, which stands under no name"),
        (Block(table=object()), "Block.table is <object .*, which cannot be written as data: use numbers"),
        (Block(table=1j), "Block.table is 1j, which cannot be written"),
        (Custom(init=nn.initializers.normal(0.1)), "Custom.init is <function normal.<locals>.init"),
        (3, "expected a flax.linen module, got 3"),
    ],
)
def test_what_cannot_be_described_is_refused_by_name(network, message):
    with pytest.raises(ValueError, match=message):
        to_data(network)


def test_differences_name_the_field_and_both_values():
    p8 = networks.PAPER["mnist_rot"]()
    assert differences(p8, p8.clone(group=groups.dihedral(4), frame=0.5)) == [
        "group: p8 there, p4m here",
        f"frame: {np.pi / 8} there, 0.5 here",
    ]
    turned = groups.from_elements(p8.group.elements[[0, 3, 6, 1, 4, 7, 2, 5]], name="p8")
    assert differences(p8, p8.clone(group=turned)) == ["group: p8 there, p8 here, with other matrices"]
    renamed = groups.from_elements(p8.group.elements + 1e-12, name="eight")
    assert differences(to_data(p8), p8.clone(group=renamed)) == []
    assert differences(ResNetCNN(1), ResNetCNN(1, widths=(16, 31, 64))) == ["widths[1]: 32 there, 31 here"]
    assert differences(ResNetCNN(1), MnistRotCNN()) == ["network: ResNetCNN there, MnistRotCNN here"]
    smooth = functools.partial(stencils.gaussian_derivative, sigma=1)
    assert differences(p8, p8.clone(scheme=smooth)) == [
        "scheme: central_difference there, partial(gaussian_derivative, sigma=1) here"
    ]
    assert differences(Block(inner=nn.Dense(2)), Block(inner=nn.Dense(3))) == ["inner.features: 2 there, 3 here"]
    older = to_data(p8)
    del older["fields"]["lowering"]
    assert differences(older, p8) == [] and from_data(older) == p8
    assert differences(older, p8.clone(lowering="dense")) == ["lowering: 'auto' there, 'dense' here"]
    odd = {"module": "elsewhere.Net", "fields": {}}  # a class that is not here
    assert differences(odd, odd | {"fields": {"width": 3}}) == ["width: its default there, 3 here"]


def field(value, module="pdo_jax.networks.MnistRotNet", name="scheme"):
    return {"module": module, "fields": {name: value}}


P2 = {"group": "p2", "elements": [[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]]}
NOT_A_MODULE = (
    """
    os.system builtins.eval subprocess.Popen jax.config evil.Net nowhere.Net flax.linen.relu Net pdo_jax.groups.Group
    pdo_jax.architecture.nn pdo_jax.architecture.nn.Dense flax.linen._Dense ..Net pdo_jax./tmp/evil.Net pdo_jax.evil.Net
    experiments.main.main numpy.f2py.Net unittest.mock.Mock
""".split()
    + [""]
)
NOT_A_FUNCTION = (
    """
    os.system builtins.eval subprocess.run jax.numpy.load jax.numpy.save jax.nn.initializers jax.numpy.os
    experiments.config.load experiments.workdir.write_text pdo_jax.export.save pickle.loads jax.numpy.float32
    pdo_jax.stencils.functools pdo_jax.stencils._gauss_hermite pdo_jax.groups.from_generators numpy.load jax.numpy.__loader__
    jax.profiler.start_trace flax.linen.Dense evil.run test_architecture_data.hook
""".split()
    + [""]
)
HOSTILE = [
    *[{"module": name, "fields": {}} for name in NOT_A_MODULE],
    *[field({"function": name}) for name in NOT_A_FUNCTION],
    *[
        field({"partial": {"function": name}, "arguments": ["touch /tmp/x"], "keywords": {"dict": []}})
        for name in NOT_A_FUNCTION
    ],
    *[field({"class": name}) for name in NOT_A_MODULE],
    *[field({"dtype": name}) for name in ("object", "O", "f4,f4", "os", "load", "generic", "ndarray")],
    *[
        field({"array": values, "of": name})
        for values, name in (([1], "object"), ([[1], [1, 2]], "int8"), ({"a": 1}, "float32"), ("x", "float32"))
    ],
    *[
        field({"group": "g", "elements": elements}, name="group")
        for elements in (
            [],
            [1.0],
            [[[1.0]], [[1.0]]],
            [[[2.0]]],
            [[[-1.0]]],
            P2["elements"] + [[[0.0, 1.0], [1.0, 0.0]]],
            [[["x"]]],
            P2["elements"][::-1],
            [[[float("nan")]]],
            [[[1.0, 0.0]]],
            P2["elements"] * 3000,
        )
    ],
    *[
        field({"representation": "r", "of": P2, "images": images})
        for images in ([], [[0]], [[0, 1], [1, 5]], [[0, 1], [0, 0]], "x", [[0] * 6000] * 2)
    ],
    field({"representation": "r", "of": P2, "matrices": [[[1.0]], [[2.0]]]}),
    field({"representation": "r", "of": {"tuple": []}, "images": [[0]]}),
    field({"partial": {"tuple": []}, "arguments": [], "keywords": {"dict": []}}),
    field({"partial": P2, "arguments": [], "keywords": {"dict": []}}),
    field({"partial": {"function": "jax.nn.relu"}, "arguments": [], "keywords": {"dict": [[1, 2]]}}),
    field({"dict": [[[], 1]]}),
    field({"dict": [[1]]}),
    field({"float": "x"}),
    field({"same": "MnistRotNet"}),
    field({"unknown": 1}),
    field({}),
    field({"function": "jax.nn.relu", "more": 1}),
    field({"default": "other"}),
    field(1, name="parent"),
    field(1, name="no_field"),
    field({"module": "flax.linen.Dense", "fields": {}}),
    field({"module": "flax.linen.Dense", "fields": []}),
    {"module": "flax.linen.Dense"},
    field(functools.reduce(lambda inner, _: {"tuple": [inner]}, range(500), 1)),
    None,
    [],
    "pdo_jax.networks.MnistRotNet",
    {},
    {"fields": {}},
    {"module": 3, "fields": {}},
    {"module": "flax.linen.Dense", "fields": {"features": 1, "name": "a", "parent": None}},
    to_data,
]


def hook(*_):
    raise AssertionError("hostile data called this")


@pytest.mark.parametrize("k", range(len(HOSTILE)))
def test_hostile_data_is_refused_before_anything_is_called_or_imported(k, tmp_path, monkeypatch):
    """One ValueError, short enough to read; in a folder with files of the names that it asks for."""
    for name in ("evil", "nowhere"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(builtins, "eval", hook)
    before = set(sys.modules)
    with pytest.raises(ValueError) as caught:
        from_data(HOSTILE[k])
    assert len(str(caught.value)) < 700
    assert {name for name in set(sys.modules) - before if name.split(".")[0] not in ("pdo_jax", "experiments")} == set()


def test_a_module_of_the_user_is_built_if_it_is_imported_or_trusted(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import flax.linen as nn\ndef act(x): return x\nclass Net(nn.Module):\n  act: object = act\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = {"module": "mine.Net", "fields": {"act": {"function": "mine.act"}}}
    with pytest.raises(ValueError, match="Net is named 'mine.Net', which is no flax.linen module .* import its module first"):
        from_data(data)
    assert "mine" not in sys.modules
    built = from_data(data, trust=["mine"])
    try:
        assert to_data(built)["module"] == "mine.Net" and built.act is sys.modules["mine"].act
        with pytest.raises(ValueError, match="Net.act is named 'mine.act', .*: name its module in trust="):
            from_data(data)
        assert isinstance(from_data({"module": "mine.Net", "fields": {}}), sys.modules["mine"].Net)
    finally:
        del sys.modules["mine"]


def test_the_library_names_itself_where_an_experiment_is_not_imported(tmp_path):
    """A folder named experiments beside the program is not taken for this library's."""
    import subprocess

    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("print('executed')")
    code = (
        "import pdo_jax\ntry: pdo_jax.architecture.from_data({'module': 'experiments.baselines.MnistRotCNN', 'fields': {}})\n"
        "except ValueError as error: print('refused', error)"
    )
    path = str(__import__("pathlib").Path(pdo.__file__).parents[1])
    linked = tmp_path / "lib"
    linked.mkdir()
    (linked / "pdo_jax").symlink_to(f"{path}/pdo_jax")
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(linked), "PATH": "/bin", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "refused" in ended.stdout and "executed" not in ended.stdout, ended
