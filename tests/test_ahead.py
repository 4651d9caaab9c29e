"""Compiling for a TPU that is not there: a small network's training step, the table of what was found, and bad names.

What needs libtpu runs in a process of its own, so that it is not loaded into the one that runs the tests.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import pdo_jax as pdo
from experiments import config
from experiments.benchmark import ahead
from experiments.config import ConfigError

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, os
import jax
import pdo_jax as pdo
from experiments.benchmark import ahead
from experiments.config import Config, ConfigError

before = dict(os.environ)
mesh = jax.sharding.Mesh(ahead.devices("v5e:2x2"), ("data",))
network = pdo.networks.MnistRotNet(group=pdo.groups.cyclic(4), features=2, head="paper")
settings = Config(network=network, batch_size=8 * mesh.size, dtype="bfloat16")
images = 64, 28, 28, 1
row = ahead.measure(settings, images, mesh, steps=2)
convolutions = ahead.lower(settings, images, mesh).as_text().count("stablehlo.convolution")
errors = []
for topology in ("v5e:3x5", "v0:2x2", ""):
    try:
        ahead.report(topology)
    except ConfigError as error:
        errors.append(str(error))
print(json.dumps([row, convolutions, errors, jax.devices()[0].platform, dict(os.environ) == before]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu")
def test_a_training_step_compiles_for_a_tpu():
    """In a loop: positive numbers, gradients and statistics reduced over the chips, plain convolutions."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_", "LIBTPU_"))}
    environment = clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    row, convolutions, errors, platform, restored = json.loads(done.stdout.splitlines()[-1])
    given = {"device": "TPU v5 lite", "devices": 4, "dtype": "bfloat16", "program": "loop of 2", "batch_per_device": 8}
    assert given.items() <= row.items()
    for key in ("compile_seconds", "estimated_seconds", "flops", "bytes_accessed", "bytes_held"):
        assert row[key] > 0, key
    assert row["estimated_seconds"] < 1
    assert row["collectives"]["all-reduce"] >= 12  # six layers' statistics and their gradients
    assert "compiler's estimate" in ahead.markdown([{"network": "small", "topology": "v5e:2x2"} | row])
    assert convolutions == 17  # six layers forward, six kernel and five input gradients: what "dense" gives
    for error, topology in zip(errors, ("v5e:3x5", "v0:2x2", ""), strict=True):
        assert f"no topology {topology!r}" in error and "v5p:2x2x1" in error
    assert platform == "cpu" and restored  # the process's own device and environment are as before


def test_without_libtpu(monkeypatch):
    """The error says what to install, before anything else is done."""
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="to compile for 'v5e:2x2' the TPU's compiler is needed; pip install libtpu"):
        ahead.report("v5e:2x2")


def test_unknown_network():
    with pytest.raises(ConfigError, match="unknown network 'p7'; the networks are MnistRotNet, p6, p6m, p8, p8_wide"):
        ahead.report("v5e:2x2", ["p7"])


def test_every_paper_network_has_a_config():
    """The networks are those of the configs, with their augmentation and optimiser."""
    for name, file in ahead.CONFIGS.items():
        network = config.load(ROOT / "experiments" / "configs" / f"{file}.py").network
        assert network == pdo.networks.PAPER["mnist_rot" if name == "MnistRotNet" else name]()
    assert len(pdo.networks.PAPER) == len(ahead.CONFIGS)


@pytest.mark.parametrize("given, expected", [(0.25, (0.25, 0)), (-1.75, (0.25, 2)), (-2.0, (0.0, 2))])
def test_estimates_are_corrected(given, expected):
    """The compiler takes a second off for every operation that it has no estimate for; it is put back and counted."""
    assert ahead.estimated(given) == expected


def test_collectives_are_counted_once():
    """Of an asynchronous pair the start counts, the end does not; names of instructions do not count."""
    program = """
  %all-reduce.1 = (f32[7], f32[7]) all-reduce(%a, %b), channel_id=1
  %all-reduce-start.2 = f32[7] all-reduce-start(%a), to_apply=%sum
  %all-reduce-done.2 = f32[7] all-reduce-done(%all-reduce-start.2)
  %all-gather.3 = f32[28] all-gather(%all-reduce.1), dimensions={0}
"""
    assert ahead.collectives(SimpleNamespace(as_text=lambda: program)) == {"all-gather": 1, "all-reduce": 2}


def test_unreadable_programs():
    """jaxlib cannot read every program of a libtpu that is newer; the row then says so and keeps its numbers."""

    def as_text():
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 4")

    assert ahead.collectives(SimpleNamespace(as_text=as_text)) is None


def test_markdown():
    """One line for each row; the table and its note call the times estimates."""
    row = {"network": "p6", "topology": "v5e:2x2", "devices": 4, "dtype": "float32", "program": "step", "batch_per_device": 8,
           "compile_seconds": 11.4, "estimated_seconds": 0.0123, "operations_without_estimate": 3, "flops": 4.5e10,
           "bytes_accessed": 1.25e9, "bytes_held": 7e7, "compiler": "libtpu 1",
           "collectives": {"all-gather": 1, "all-reduce": 9}}
    table = ahead.markdown([row, row | {"collectives": {}}, row | {"collectives": None}])
    head, rule, first, second, third, blank, note = table.splitlines()
    assert "compiler's estimate" in head and set(rule) == set("|- ") and not blank
    assert first == "| v5e:2x2 (4) | p6 | float32 | step | 8 | 11 | 12.30 | 3 | 45.0 | 1.25 | 70 | 1 all-gather, 9 all-reduce |"
    assert second.endswith("| none |") and third.endswith("| not readable |")
    assert "estimates" in note and "libtpu 1" in note
