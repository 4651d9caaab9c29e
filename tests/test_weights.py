"""Networks in files: what was saved comes back to the bit; other, damaged and foreign files are refused in one line."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors import safe_open
from safetensors.numpy import save_file

import pdo_jax as pdo
from pdo_jax import weights

NETWORK = pdo.networks.ResNet(num_classes=3, group=pdo.groups.dihedral(3), widths=(2, 3), blocks=1, kernel_size=3,
                              scheme=pdo.stencils.gaussian_derivative, dtype=jax.numpy.bfloat16)


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), np.ones([1, 8, 8, 1]))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture
def file(tmp_path, variables):
    path = tmp_path / "net.safetensors"
    pdo.export.save(path, NETWORK, variables)
    return path


def test_a_network_comes_back_to_the_bit(file, variables):
    """The module is equal, so are all arrays, their types and their tree; only the file is left in the folder."""
    for given in (None, NETWORK):
        network, read = pdo.export.load(file, given)
        assert network == NETWORK
        jax.tree.map(np.testing.assert_array_equal, read, variables)
        assert jax.tree.map(lambda a: a.dtype, read) == jax.tree.map(lambda a: a.dtype, variables)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def rewrite(file, metadata=(), arrays=()):
    with safe_open(file, framework="numpy") as opened:
        old, content = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    save_file(content | dict(arrays), file, old | dict(metadata))


def rename(file):
    """The class of another, with a right checksum."""
    with safe_open(file, framework="numpy") as opened:
        described, content = opened.metadata()["network"], {name: opened.get_tensor(name) for name in opened.keys()}
    described = described.replace("pdo_jax.networks.ResNet", "os.system")
    rewrite(file, {"network": described, "sha256": weights._checksum(described, content)})


@pytest.mark.parametrize("damage, message", [
    (lambda file: file.write_bytes(b"years of work"), "is damaged, or no safetensors file"),
    (lambda file: file.write_bytes(file.read_bytes()[:-8]), "is damaged, or no safetensors file"),
    (lambda file: file.write_bytes(file.read_bytes()[:-8] + bytes(8)), "is damaged: .* checksum"),
    (lambda file: rewrite(file, {"format": "pdo_jax network, version 9"}), "format 'pdo_jax network, version 9'; pdo_jax"),
    (lambda file: save_file({"a": np.ones(3)}, file), "has the format None; pdo_jax .* reads 'pdo_jax network, version 1'"),
    (lambda file: rewrite(file, arrays={"params/head/bias": np.zeros(7, np.float32)}), "is damaged: .* checksum"),
    (lambda file: rewrite(file, {"network": json.dumps({"module": "os.system", "fields": {}})}), "is damaged: .* checksum"),
    (rename, "'os.system', which is no flax.linen module"),
], ids=["other", "cut", "zeroed", "version", "foreign", "shape", "module", "forged"])
def test_a_file_that_cannot_be_used_is_refused_in_one_line(file, damage, message):
    damage(file)
    with pytest.raises(ValueError, match=message) as error:
        pdo.export.load(file)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(file))


@pytest.mark.parametrize("changes, message", [
    ({"group": pdo.groups.cyclic(4)}, "group: p3m there, p4 here"), ({"widths": (2, 4)}, r"widths\[1\]: 3 there, 4 here"),
    ({"scheme": pdo.stencils.central_difference}, "scheme: gaussian_derivative there, central_difference here"),
])
def test_another_network_is_refused_by_the_first_field_that_differs(file, changes, message):
    with pytest.raises(ValueError, match=f"holds another network; the first field that differs is {message}"):
        pdo.export.load(file, NETWORK.clone(**changes))


def test_what_cannot_be_saved_leaves_no_file(tmp_path, variables):
    for network, tree, message in ((nn.Sequential([lambda x: x]), variables, "lambda"), (NETWORK, {"w": 1}, "params")):
        with pytest.raises(ValueError, match=message):
            pdo.export.save(tmp_path / "net", network, tree)
    assert not list(tmp_path.iterdir())
