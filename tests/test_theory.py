"""The theorem on coarse grids, the command that measures it, and the three-dimensional experiment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdo_jax as pdo
from experiments import config, datasets, equivariance, record, train
from experiments.datasets import shapes3d
from experiments.volumes import VolumeCNN, VolumeNet
from pdo_jax import groups, stencils


@pytest.mark.parametrize(
    ("group", "scheme", "size", "low", "high"),
    [
        (groups.cyclic(6), equivariance.SECOND, 5, 1.7, 2.3),
        (groups.cyclic(8), stencils.gaussian_derivative, 5, 1.7, 2.3),
        (groups.icosahedral(), stencils.central_difference, 3, 1.7, 2.3),
        (groups.cyclic(8), equivariance.FOURTH, 5, 3.5, 4.5),
    ],
    ids=["p6", "p8 Gaussian", "icosahedral", "p8 accuracy 4"],
)
def test_error_falls_as_the_theorem_says(group, scheme, size, low, high):
    spacings = [0.1, 0.05]
    errors = [equivariance.layer_error(group, scheme, size, h) for h in spacings]
    assert low < equivariance.fitted_slope(spacings, errors) < high


def test_elements_that_preserve_the_grid_are_exact():
    assert equivariance.layer_error(groups.cyclic(4), stencils.central_difference, 5, 0.1) < 1e-11
    assert equivariance.layer_error(groups.octahedral(), stencils.central_difference, 3, 0.1) < 1e-11


def test_pair_is_pdo_jax_layers():
    """The operators measured are those of the modules: at h = 1 the lifting's stencils sum up to p(A^{-1}∇)."""
    group = groups.cyclic(8)
    random = np.random.default_rng(0)
    layers = equivariance.pair(group, stencils.central_difference, 5, 2, 1.0, random)
    first = np.random.default_rng(0).normal(size=(6, 1, 1, equivariance.FEATURES))
    x = np.random.default_rng(1).normal(size=(1, 9, 9, 1)).astype(np.float32)
    bank = pdo.kernels.bank(group, 5, 2)
    mixing = np.linalg.lstsq(bank.turned[0].T, np.eye(6), rcond=None)[0]  # module parameters of each ∂^α
    second = random_second(group)
    y = layers(x[..., 0])
    options = dict(group=group, padding="VALID", basis=2)
    w1, w2 = (np.einsum("pq,qicf->picf", mixing, w) for w in (first, second))
    lifting, conv = (kind(equivariance.FEATURES, **options) for kind in (pdo.LiftingConv, pdo.GroupConv))
    z = jnp.tanh(lifting.apply({"params": {"kernel": jnp.asarray(w1, jnp.float32)}}, x))
    z = conv.apply({"params": {"kernel": jnp.asarray(w2, jnp.float32)}}, z)
    np.testing.assert_allclose(z[:, 0, 0], y, rtol=1e-3, atol=1e-3)


def random_second(group):
    random = np.random.default_rng(0)
    random.normal(size=(6, 1, 1, equivariance.FEATURES))
    return random.normal(size=(6, equivariance.FEATURES, group.order, equivariance.FEATURES))


def test_quick_command_writes_its_files(tmp_path, capsys):
    equivariance.command(["--quick", "--out", str(tmp_path / "new")])
    table = (tmp_path / "new" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "python -m experiments.equivariance --quick" in table and "| p4, accuracy 2 |" in table
    pictures = sorted(path.name for path in (tmp_path / "new").glob("*.png"))
    assert pictures == ["angle_layer.png", "depth.png", "fields.png", "operators.png", "theorem.png"]
    assert all((tmp_path / "new" / name).stat().st_size < 150_000 for name in pictures)


def test_shapes_are_the_same_every_time_balanced_and_need_no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    sizes = {"train": 16, "test": 8}
    (splits, note), (again, _) = (shapes3d.generate(sizes=sizes) for _ in range(2))
    for split, n in sizes.items():
        images, labels = splits[split]
        np.testing.assert_array_equal(images, again[split][0])
        assert images.shape == (n, 17, 17, 17, 1) and images.dtype == np.float32 and 0 <= images.min() <= images.max() <= 1
        assert (np.bincount(labels) == n / 8).all()
    assert "generated from analytic shapes" in note
    assert {name: count % 8 for name, count in shapes3d.IMAGES.items()} == {"train": 0, "test": 0}
    turned = shapes3d.generate(turned=True, sizes=sizes)[0]
    assert np.abs(turned["train"][0] - splits["train"][0]).max() > 0.5
    assert not np.array_equal(splits["train"][0][:8], splits["test"][0])


def test_shapes_turn_as_arrays_do_and_the_screws_are_mirror_images():
    for index, matrix in enumerate(groups.octahedral().elements):
        name = list(shapes3d.CELLS)[index % 8]
        array = groups.transform(jnp.asarray(shapes3d.volume(name))[None, ..., None], matrix)[0, ..., 0]
        np.testing.assert_allclose(shapes3d.volume(name, matrix), array, atol=1e-5)
    mirror = np.diag([1.0, 1.0, -1.0])
    np.testing.assert_allclose(shapes3d.volume("right screw", mirror), shapes3d.volume("left screw"), atol=1e-5)
    inside = [shapes3d.volume(name).sum() for name in shapes3d.CELLS]
    low, high = shapes3d.SIDE
    assert max(inside) / min(inside) < 1.1 < (high / low) ** 3  # the volume tells little: scales differ by more


def test_random_rotations_are_rotations():
    r = shapes3d.random_rotations(np.random.default_rng(0), 2000)
    np.testing.assert_allclose(r @ r.swapaxes(1, 2), np.broadcast_to(np.eye(3), r.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(r), 1)
    assert np.abs(r.mean(0)).max() < 0.06  # uniform: every entry has mean 0 and variance 1/3
    np.testing.assert_allclose((r**2).mean(0), np.full((3, 3), 1 / 3), atol=0.04)
    tilted = shapes3d.random_rotations(np.random.default_rng(0), 200, np.radians(30))
    angles = np.degrees(np.arccos((np.trace(tilted, axis1=1, axis2=2) - 1) / 2))
    assert 28 < angles.max() <= 30 and angles.min() < 2


@pytest.mark.parametrize("name", ["octahedral", "icosahedral"])
def test_volume_net_keeps_the_turns_of_the_grid(name):
    network = config.load(f"experiments/configs/shapes3d_{name}.py").network
    x = jax.random.normal(jax.random.key(0), (1, 17, 17, 17, 1))
    turns = [a for a in groups.octahedral().elements if any(np.allclose(a, b) for b in network.group.elements)]
    assert len(turns) == (24 if name == "octahedral" else 12)
    variables = jax.jit(network.init)(jax.random.key(1), x)
    logits = jax.jit(network.apply)(variables, jnp.concatenate([groups.transform(x, a) for a in turns]))
    np.testing.assert_allclose(logits, np.tile(logits[:1], (len(turns), 1)), atol=1e-5 * np.abs(logits).max())


def test_reflections_would_confuse_the_screws():
    screws = jnp.stack([jnp.asarray(shapes3d.volume(f"{side} screw"))[..., None] for side in ("left", "right")])
    for group, same in ((groups.reflection(3), True), (groups.from_generators([np.diag([-1.0, -1, 1])]), False)):
        logits, _ = jax.jit(VolumeNet(group, widths=(2, 2, 2), head_features=4).init_with_output)(jax.random.key(0), screws)
        assert (np.abs(logits[0] - logits[1]).max() < 1e-5 * np.abs(logits).max()) == same


def test_networks_of_the_volumes_have_equal_parameters():
    count = {}
    for name in ("octahedral", "icosahedral", "cnn"):
        network = config.load(f"experiments/configs/shapes3d_{name}.py").network
        variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 17, 17, 17, 1)))
        count[name] = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert max(count.values()) < 1.05 * min(count.values()), count


def test_the_training_loop_takes_volumes(tmp_path):
    splits, note = shapes3d.generate(sizes={"train": 16, "test": 8})
    split = {name: datasets.Split(*arrays) for name, arrays in splits.items()}
    none = datasets.Split(*(a[:0] for a in split["train"]))
    data = datasets.Dataset("shapes3d", split["train"], none, split["test"], 8, note)
    network = VolumeCNN(widths=(2, 2, 2), head_features=4)
    given = config.make(dict(network=network, dataset="shapes3d", batch_size=8, eval_batch_size=8))
    result = train.train(given, tmp_path / "run", data)
    assert result["images"]["test"] == 8 and np.isfinite(result["test_loss"])
    assert np.shape(record.read_config(tmp_path / "run")["input"]["mean"]) == (1,)
