"""The floors of the library: imports only ever go down, and importing it brings in nothing that it does not use."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pdo_jax

FOLDER = Path(pdo_jax.__file__).parent
FLOORS = [  # from the ground up; within a floor a module may use those before it
    ["_version", "groups", "operators", "fields", "stencils"],
    ["kernels", "steerable"],
    ["lowering.compiler", "lowering.bilinear", "lowering.layout", "lowering.channels", "lowering.dense", "lowering.matmul",
     "lowering.fourier", "lowering"],
    ["mixing", "conv", "layers", "sampling", "nonlinearities", "architecture", "weights"],
    ["networks"],
    ["equivariance", "export"],
    ["__init__"],
    ["nnx.face", "nnx.layers", "nnx.networks", "nnx"],
]
HEIGHT = {name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)}
THIRD_PARTY = {  # what each floor may use; numpy alone where mathematics is done in float64
    "_version": set(), "fields": {"numpy", "jax"}, "operators": {"numpy"}, "stencils": {"numpy"}, "steerable": {"numpy"},
    "groups": {"numpy", "jax"}, "kernels": {"numpy", "jax"}, "equivariance": {"numpy", "jax", "flax"},
    "lowering.compiler": {"jax"}, "lowering.bilinear": {"jax"}, "lowering.layout": {"numpy", "jax"},
    "lowering.channels": {"jax"}, "lowering.dense": {"jax"},
    "lowering.matmul": {"numpy", "jax"}, "lowering.fourier": {"numpy", "jax"}, "lowering": {"numpy", "jax"},
    "conv": {"numpy", "jax", "flax"}, "layers": {"numpy", "jax", "flax"}, "nonlinearities": {"numpy", "jax", "flax"},
    "sampling": {"numpy", "jax"}, "mixing": {"numpy", "jax"},
    "networks": {"numpy", "jax", "flax"}, "export": {"numpy", "jax", "flax", "flatbuffers", "jax2onnx", "onnx_ir"},
    "architecture": {"numpy", "jax", "flax"}, "weights": {"numpy", "flax", "safetensors"}, "__init__": set(),
    "nnx.face": {"numpy", "jax", "flax"}, "nnx.layers": {"flax"}, "nnx.networks": {"flax"}, "nnx": set(),
}
FILES = {".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__"): path
         for path in FOLDER.rglob("*.py")}
MODULES = sorted(FILES)


def imports(module):
    """The modules of this library that a file imports, anywhere in it, and the other packages outside Python's own."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(["pdo_jax"] * bool(node.level) + [node.module] * bool(node.module))
            names = [f"{source}.{alias.name}" for alias in node.names] if source.startswith("pdo_jax") else [source]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "pdo_jax":  # the longest beginning that is a module
                own.add(next((m for k in (2, 1) if (m := ".".join(rest[:k])) in FILES), "__init__"))
            elif package not in sys.stdlib_module_names:
                others.add(package)
    return own, others


def test_every_file_has_a_floor():
    """A new file of the library is given its place in FLOORS and its packages in THIRD_PARTY."""
    assert set(MODULES) <= set(HEIGHT), f"files without a floor: {sorted(set(MODULES) - set(HEIGHT))}"
    assert set(HEIGHT) == set(THIRD_PARTY)


def test_the_library_is_small():
    """At most 4 500 lines, blank ones not counted, docstrings counted; a layer that is three lines of others is documented as
    these."""
    assert sum(bool(line.strip()) for path in FILES.values() for line in path.read_text().splitlines()) <= 4500


@pytest.mark.parametrize("module", [m for m in MODULES if m in HEIGHT])
def test_imports_only_go_down(module):
    """A file imports only from floors below its own, or from files before it on its floor."""
    upwards = {other for other in imports(module)[0] if HEIGHT[other] >= HEIGHT[module]}
    assert not upwards, f"{module} imports {sorted(upwards)} from its own height or above"


@pytest.mark.parametrize("module", [m for m in MODULES if m in HEIGHT])
def test_third_party_imports(module):
    """Nothing but numpy, jax and flax; flax only from conv and layers upward; never the experiments."""
    extra = imports(module)[1] - THIRD_PARTY[module]
    assert not extra, f"{module} imports {sorted(extra)}"


def test_lowering_stands_alone():
    """The folder lowering imports jax, numpy and itself: it can be lifted out as it is."""
    files = [m for m in MODULES if m.split(".")[0] == "lowering"]
    assert set().union(*(imports(f)[0] for f in files)) < set(files)
    assert all(imports(f)[1] <= {"jax", "numpy"} for f in files)


def test_the_public_names_are_listed():
    """__init__ is an explicit, sorted list of names that exist."""
    assert pdo_jax.__all__ == sorted(pdo_jax.__all__)
    assert all(hasattr(pdo_jax, name) for name in pdo_jax.__all__)


def test_importing_the_library_brings_in_nothing_else():
    """In a fresh process: no experiments, TensorFlow, Orbax, Optax, Matplotlib or flax.nnx, no change of the environment, no
    device."""
    code = """
import os, sys
before = dict(os.environ)
import jax  # sets some variables of its own
environment = dict(os.environ)
import pdo_jax
unwanted = {"experiments", "tensorflow", "orbax", "optax", "matplotlib", "tensorflow_datasets", "pdo_jax.nnx", "flax.nnx"}
unwanted &= set(sys.modules)
assert not unwanted, unwanted
assert dict(os.environ) == environment
jax.config.update("jax_num_cpu_devices", 3)  # an error once there is a device
assert jax.device_count() == 3
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parent)}
    environment.pop("XLA_FLAGS", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
