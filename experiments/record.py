"""What a run is: all that its numbers depend on, as JSON data that two starts of one run can be compared by."""

import ast
import dataclasses
import functools
import hashlib
import json
import os
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import datasets
from experiments.config import Config, closure, describe
from experiments.datasets import stream
from experiments.workdir import TrainError, read_json, versions
from pdo_jax import architecture

NOTED = {"config.data_dir", "config.parallel", "config.stream", "versions.python", "versions.orbax-checkpoint"}
"""What is told, but leaves a run the same: the data are compared themselves, and the ways to run an epoch agree."""
SAVED = {"record": {"config": dict, "network": (dict, str), "code": dict, "data": dict}, "forced": [str],
         "input": {"shape": [int], "mean": [float], "deviation": [float], "range": [float], "own": bool}}
"""What is read of config.json."""


def of(config: Config, data: datasets.Dataset, source: Mapping | None = None) -> dict:
    """The record of a run: its config, network, code, data, devices, precision and versions."""
    return json.loads(json.dumps({
        **config_of(config),
        "code": code(config, source),
        "data": data_of(data),
        "devices": {"count": jax.device_count(), "processes": jax.process_count(), "kind": jax.devices()[0].device_kind},
        "precision": {"x64": jax.config.jax_enable_x64, "matmul": jax.config.jax_default_matmul_precision,
                      "random": jax.config.jax_default_prng_impl, "flags": os.environ.get("XLA_FLAGS", "")},
        "versions": versions(),
    }))


def config_of(config: Config) -> dict:
    """The parts of a record that a config gives."""
    described = describe(config)
    del described["network"]
    return json.loads(json.dumps({"config": described, "network": network(config.network)}))


def network(module: nn.Module):
    """A network as data, or, if it has no name that can be imported, described for comparison alone."""
    try:
        return architecture.to_data(module)
    except ValueError:
        return describe(module)


def data_of(data: datasets.Dataset) -> dict:
    """A hash of each split, and what they are. A stream is known by its files, so it is told from the same images in memory."""
    streamed = {"streamed": True} if isinstance(data.train.images, stream.Images) else {}
    splits = {split: _digest(getattr(data, split)) for split in ("train", "validation", "test")}
    return {"name": data.name, "classes": data.num_classes} | streamed | splits


def differences(there: Mapping, here: Mapping) -> tuple[list[str], list[str]]:
    """(What changes the numbers of a run, what only has to be told), a line each."""
    grave, told = [], []
    for part in there | here:
        saved, given = there.get(part), here.get(part)
        if part == "network" and _is_architecture(saved) and _is_architecture(given):
            grave += [f"network.{line}" for line in architecture.differences(saved, given)]
        elif part == "network" or not isinstance(saved, Mapping) or not isinstance(given, Mapping):
            grave += [] if saved == given else [f"{part}: {_short(saved)} there, {_short(given)} here"]
        else:
            for key in saved | given:
                if saved.get(key) != given.get(key):
                    name = key if part == "config" else f"{part}.{key}"
                    line = (f"{name} has changed" if part == "code" and key in saved and key in given else
                            f"{name}: {_short(saved.get(key))} there, {_short(given.get(key))} here")
                    (told if f"{part}.{key}" in NOTED else grave).append(line)
    return grave, told


def resume(workdir: Path, here: Mapping, force: bool) -> list[str]:
    """Compares with the record in the folder, if there is one; returns the differences that were forced, now or before.

    Raises:
      TrainError: the run was begun with something that gives other numbers, and is not to go on all the same.
    """
    if not (workdir / "config.json").exists():
        return []
    saved = read_config(workdir)
    grave, told = differences(saved["record"], here)
    if grave and not force:
        raise TrainError(
            f"{workdir} holds a run of another config, code, data or machine; choose another --workdir, or go on all the same "
            "with --force-resume, which the result will tell. They differ in\n  " + "\n  ".join(grave)
        )
    if (told or grave) and jax.process_index() == 0:
        print("note: this run was begun otherwise: " + "; ".join([*told, *grave]), file=sys.stderr)
    return [*saved["forced"], *grave]


def read_config(workdir: Path) -> dict:
    """What config.json says of a run: its record, its input, what was forced."""
    saved = read_json(workdir / "config.json", SAVED)
    shape, mean, deviation, range_ = (saved["input"][key] for key in ("shape", "mean", "deviation", "range"))
    sizes = len(shape) > 1 and all(0 < size < 1 << 20 for size in shape)
    if not (sizes and len(mean) == len(deviation) == shape[-1] and len(range_) == 2):
        raise TrainError(f"{workdir / 'config.json'} is damaged: its input has no shape, mean, deviation, range of an image; "
                         "put a whole one in its place, or choose another run")
    return saved


def agree(here: Mapping):
    """Processes that train together must have one record; an error in all of them if not."""
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in here.values()]
    everywhere = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1))
    differing = [part for k, part in enumerate(here) if (everywhere[:, k] != everywhere[0, k]).any()]
    if differing:
        raise TrainError(f"the processes differ in their {', '.join(differing)}; start all with one command, code and data")


def code(config: Config, source: Mapping | None = None) -> dict[str, str]:
    """{module: hash} of the program text that the config names, and of all that this text imports, but installed packages.

    Comments and docstrings do not count. Of the loop itself, `experiments.programs` and `experiments.train` count.
    """
    queue = sorted({name for thing in _named(config) if (name := getattr(thing, "__module__", None))})
    found = {}
    for name in queue:  # grows while it is walked
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if name not in found and file and _is_ours(file):
            found[name] = _text_hash(Path(file))
            reached = (value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
                       for value in vars(module).values())
            queue += [other for other in dict.fromkeys(reached) if isinstance(other, str) and other not in found
                      and (_in_experiments(name) or not _in_experiments(other))]  # what runs a network is no part of it
    found |= {f"experiments.{name}": _text_hash(Path(__file__).with_name(f"{name}.py")) for name in ("programs", "train")}
    if source:
        found["the config file"] = _text_hash(Path(source["file"]))
    return dict(sorted(found.items()))


def _is_architecture(value):
    return isinstance(value, Mapping) and "fields" in value


def _digest(split) -> str:
    found = hashlib.sha256(f"{split.images.shape}".encode())
    for array in split:
        found.update(array.digest().encode() if isinstance(array, stream.Images) else
                     np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return found.hexdigest()


def _named(value) -> Iterator:
    """The classes and functions in a config."""
    if isinstance(value, functools.partial):
        yield from _named([value.func, *value.args, *value.keywords.values()])
    elif isinstance(value, nn.Module | Config):
        yield type(value)
        yield from _named([getattr(value, field.name) for field in dataclasses.fields(value) if field.name != "parent"])
    elif isinstance(value, Mapping):
        yield from _named(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _named(item)
    elif isinstance(value, type):
        yield value
    elif callable(value):
        yield value if hasattr(value, "__module__") else type(value)
        yield from _named(closure(value))


def _in_experiments(name: str) -> bool:
    return name.partition(".")[0] == "experiments"


@functools.cache
def _installed() -> Sequence[str]:
    return tuple(os.path.realpath(path) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
                 if (path := sysconfig.get_path(name)))


def _is_ours(file: str) -> bool:
    return file.endswith(".py") and not os.path.realpath(file).startswith(_installed())


def _text_hash(file: Path) -> str:
    return _hash(file.read_bytes())


@functools.cache
def _hash(text: bytes) -> str:
    """Of a program without its comments and docstrings."""
    try:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body[0] = ast.Pass()
        text = ast.unparse(tree).encode()
    except (SyntaxError, ValueError):
        pass
    return hashlib.sha256(text).hexdigest()[:16]


def _short(value) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
