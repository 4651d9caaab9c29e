"""Types of the public surface: every signature has them, and mypy takes a user's program and finds the mistakes in another."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pdo_jax

TESTS = Path(__file__).parent
MODULES = ["pdo_jax", *(module.name for module in pkgutil.walk_packages(pdo_jax.__path__, "pdo_jax."))]
WRONG = """\
import jax.numpy as jnp
import pdo_jax as pdo
import pdo_jax.nnx as pnn
group = pdo.groups.cyclic(8)
pdo.GroupConv(features="8", group=group)  # wrong: type
pdo.GroupBatchNorm()  # wrong: no group
pdo.max_pool(jnp.zeros((1, 4, 4, 1, 8)), 8)  # wrong: no group
pdo.LiftingConv(8, group, paddings=1)  # wrong: name
pdo.LiftingConv(8, group, padding=1)
pnn.GroupConv(8, 8, group)  # wrong: no rngs
pdo.group_pool(jnp.zeros((1, 4, 4, 1, 8)), group).nothing  # wrong: an array has no such attribute
"""


def signatures(name):
    """The public functions, and the public methods of the public classes, that a module defines."""
    for key, value in vars(importlib.import_module(name)).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value):
            yield f"{name}.{key}", value
        elif inspect.isclass(value):
            for method, function in vars(value).items():
                if inspect.isfunction(function) and (method == "__call__" or not method.startswith("_")):
                    yield f"{name}.{key}.{method}", function


@pytest.mark.parametrize("name", MODULES)
def test_public_signatures_are_annotated(name):
    bare = []
    for path, function in signatures(name):
        signature = inspect.signature(inspect.unwrap(function))
        bare += [f"{path}({p.name})" for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        bare += [f"{path} ->"] * (signature.return_annotation is signature.empty)
    assert not bare


def test_signatures_are_found():
    assert "pdo_jax.layers.GroupBatchNorm.__call__" in dict(signatures("pdo_jax.layers"))
    assert "pdo_jax.sampling.max_pool" in dict(signatures("pdo_jax.sampling"))


@pytest.mark.parametrize("layer", [pdo_jax.LiftingConv, pdo_jax.GroupConv])
def test_help_names_every_argument(layer):
    """The docstring stands before all that Flax adds: the first screen of ``help`` tells what can be set."""
    arguments = inspect.signature(layer).parameters.keys() - {"parent", "name"}
    assert len(arguments) == (18 if layer is pdo_jax.GroupConv else 16)
    assert not [name for name in arguments if f"{name}:" not in layer.__doc__]


def test_the_package_says_that_it_is_typed():
    assert (Path(pdo_jax.__file__).parent / "py.typed").exists()


def test_the_typed_program_runs(tmp_path):
    import typed_user
    assert typed_user.main(str(tmp_path)).shape == (2, 3)
    assert typed_user.faces(pdo_jax.groups.cyclic(4))[1].shape == (1, 2, 2, 2, 4)
    assert len({group.order for group in typed_user.groups()}) == 4
    assert typed_user.representations(pdo_jax.groups.cyclic(3)).dim == 1 + 2 + 2 + 3


def test_mypy(tmp_path):
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}"]
    done = subprocess.run([*command, str(TESTS / "typed_user.py"), str(wrong)], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "MYPYPATH": str(Path(pdo_jax.__file__).parents[1])}, timeout=300)
    found = [line.split(": error:")[0] for line in done.stdout.splitlines() if ": error:" in line]
    expected = [f"wrong.py:{n}" for n, line in enumerate(WRONG.splitlines(), 1) if "# wrong" in line]
    assert found == expected, done.stdout + done.stderr
