"""Builds the demo: python -m docs.demo.build OUT && python -m http.server -d OUT   (needs the extra `onnx`, and npm).

Writes into OUT the page, both networks as ONNX, the fields of the first layer, twelve digits, and onnxruntime-web from npm.
"""

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
import types
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import pdo_jax as pdo
from experiments import baselines, datasets

HERE = Path(__file__).parent
PACKAGE = "onnxruntime-web@1.30.0"
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SHAPE = (1, 28, 28, 1)


class FirstLayer(nn.Module):
    """The fields behind the first layer of MnistRotNet, [1, 26, 26, features · order], orientations last."""

    network: pdo.networks.MnistRotNet

    @nn.compact
    def __call__(self, x, train=False):
        net = self.network
        options = {name: getattr(net, name) for name in ("features", "group", "basis", "scheme", "frame")}
        y = pdo.LiftingConv(**options, padding=1, name="conv1")(x)
        y = net.activation(pdo.GroupBatchNorm(net.group, name="norm1")(y, train))
        return y.reshape(*y.shape[:3], -1)


def networks():
    """(What turns, the plain CNN, the fields of what turns), each (network, variables) that takes images in [0, 1]."""
    ours, weights = pdo.networks.load_pretrained("mnist_rot_small")
    inner = {kind: {name: tree["inner"][name] for name in ("conv1", "norm1") if name in tree["inner"]}
             for kind, tree in weights.items()}
    first = pdo.networks.Normalised(FirstLayer(ours.inner), ours.mean, ours.deviation)
    return (ours, weights), pdo.export.load(HERE / "cnn.safetensors"), (first, {k: {"inner": v} for k, v in inner.items()})


def halved(x, window_shape, strides):
    """nn.max_pool of 2×2 windows that tile an even image."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def digits():
    """Twelve test digits of the embedded set, bytes: one of each class, and two more."""
    test = datasets.load("mnist_rot/subset").test
    chosen = [int(np.flatnonzero(test.labels == label)[3]) for label in range(10)]
    chosen += [int(np.flatnonzero(test.labels == label)[7]) for label in (3, 7)]
    return [{"label": int(test.labels[k]), "image": np.uint8(np.rint(255 * test.images[k])).ravel().tolist()} for k in chosen]


def build(out: Path):
    (out / "vendor").mkdir(parents=True, exist_ok=True)
    for name in ("index.html", "demo.mjs", "style.css"):
        shutil.copy(HERE / name, out / name)
    flax = types.SimpleNamespace(**vars(nn) | {"max_pool": halved})
    with mock.patch.object(baselines, "nn", flax):  # jax2onnx 0.17 converts nn.max_pool to windows along the wrong axes
        for name, (network, variables) in zip(("pdo_econv", "cnn", "fields"), networks(), strict=True):
            (out / f"{name}.onnx").write_bytes(pdo.export.to_onnx(network, variables, SHAPE))
    (out / "digits.json").write_text(json.dumps(digits()))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            for name in RUNTIME:
                (out / "vendor" / name).write_bytes(archive.extractfile(f"package/dist/{name}").read())


def logits(images):
    """[2, n, 10]: what the two networks say in JAX of images [n, 28, 28, 1]."""
    return np.stack([network.apply(variables, jnp.asarray(images)) for network, variables in networks()[:2]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    build(parser.parse_args().out)
