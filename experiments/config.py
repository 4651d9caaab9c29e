"""What a run is: the `Config` of an experiment, read from a plain Python file and checked field by field.

A config file defines `config = dict(network=..., dataset=..., ...)`, whose keys are the fields of `Config` below. It
overrides only what differs: from the defaults, or from another file (`config = base | dict(augment=rotate)`).
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib.machinery
import importlib.util
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import optax

from experiments import losses
from experiments.boundary import Refused
from experiments.datasets.augment import moments
from pdo_jax.groups import Group


class ConfigError(Refused, ValueError):
    """A config or a command line that cannot be run; the message says what was given, expected, and what to do."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. The same config gives the same numbers on the same kind and number of devices."""

    network: nn.Module
    """Called as `network(images [n, H, W, C], train)`, gives logits [n, num_classes], or what `loss` compares to targets."""
    dataset: str | Callable = "mnist_rot/subset"
    """A name known to `experiments.datasets.load`; data of your own, "folder:PATH", "npz:PATH" or "tfds:NAME[/config][:split]"
    (see `datasets.own`); or a function without arguments that gives a `datasets.Dataset`."""
    image_size: int | None = None
    """Height and width that pictures of your own are brought to; None: they have one size."""
    stream: Literal["auto", True, False] = "auto"
    """Pictures of folder: and tfds: stay where they are, and batches are read while the step before them runs: the same numbers
    for less memory. "auto": if the pictures would take more than a quarter of it. See `datasets.stream`."""
    data_dir: str | None = None
    """Where data sets are kept; None is the data sets' own default."""
    validation: int = 0
    """Images held out of the train set; the rest is trained on. Every choice between models is made on these."""
    augment: Callable | None = None
    """A function of (key, images [n, H, W, C] in [0, 1]), traced into the step; see `datasets.augment`. Where targets are
    more than a class it is one of (key, images, targets), and gives both."""
    moments: Callable = moments
    """A function of the train images that gives the mean and the deviation by which all images are normalised, [channels]."""
    loss: Callable = losses.cross_entropy
    """A function of (outputs, targets) that gives the loss of each example, [n]; see `losses`."""
    metrics: Mapping = dataclasses.field(default_factory=lambda: {"error": losses.ERROR})
    """What is told beside the loss: `losses.Metric` by name."""
    epochs: int = 1
    batch_size: int = 128
    """Images in one update, over all devices. An epoch drops the remainder: 12 000 images are 93 batches of 128."""
    optimizer: Callable = optax.adam
    """Called with the learning rate (an optax schedule), gives an optax transformation."""
    learning_rate: float | Callable = 1e-3
    """A rate, or a function of the epoch, which has a fraction, and the number of epochs; see `piecewise`, `warmup_cosine`."""
    l2: float = 0.0
    """The loss gets l2/2 · ||w||², summed over every weight: all parameters named "kernel", no bias or batch norm."""
    label_smoothing: float = 0.0
    """This part of a target that is a class is spread evenly over all classes."""
    ema: float = 0.0
    """With ema > 0 what is evaluated is a running average of weights and batch statistics: after each update it keeps the
    part `ema` of itself, in the first updates less, (t + 1) / (t + 10) in the one with t before it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters, statistics and the loss stay in float32."""
    start: Mapping | None = None
    """The fields of another config, whose run goes first, on the data and with the seed of this one, in the folder `start` of
    its workdir, unless a finished one is there. This one begins with its weights (the average, with `ema`), and their kernels
    factored where this network has ranks: see `pdo_jax.kernels.factored`."""
    seed: int = 0
    """Seeds the initial weights, the order of the images, dropout and augmentation."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the batch is split over devices: `jax.jit` over a mesh, or `jax.pmap`. Both give the same numbers, to rounding."""
    scan: Literal["auto", True, False] = "auto"
    """An epoch as one compiled loop (True) or a Python loop over a compiled step. "auto" compiles the loop, except for a stream
    and, on a CPU, for a network that uses lax.conv, which XLA runs some 30 times slower inside a compiled loop."""
    eval_batch_size: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.start is not None:
            self.first()

    def first(self) -> "Config":
        """The config of the run that goes first, by `start`."""
        shared = ("dataset", "image_size", "stream", "data_dir", "validation", "moments", "seed")
        try:
            return make({**self.start} | {name: getattr(self, name) for name in shared})
        except ConfigError as error:
            raise ConfigError(f"start: {error}") from error


_LARGEST = 2**32 - 1  # what a random key is made of, and more than any count
_AT_LEAST = {"validation": 0, "image_size": 1, "epochs": 1, "batch_size": 1, "l2": 0.0, "label_smoothing": 0.0, "ema": 0.0,
             "seed": 0, "eval_batch_size": 1}
_BELOW = {"label_smoothing": 1.0, "ema": 1.0}


def piecewise(rates: Mapping[float, float], epoch, epochs) -> jnp.ndarray:
    """A constant rate from each epoch on: `piecewise({0: 1e-3, 100: 1e-4}, 99.5, 200)` is 1e-3. The keys rise from 0."""
    keys = list(rates)
    if not keys or keys[0] != 0 or keys != sorted(set(keys)):
        raise ConfigError(f"piecewise takes {{epoch: rate}} with rising epochs, the first of them 0, got {dict(rates)}")
    starts, values = jnp.array(list(rates), jnp.float32), jnp.array(list(rates.values()), jnp.float32)
    return values[jnp.searchsorted(starts, epoch, side="right") - 1]


def warmup_cosine(peak: float, warmup: float, epoch, epochs: int) -> jnp.ndarray:
    """Rises linearly from 0 to `peak` over `warmup` > 0 epochs, at most half of all, then falls to 0 as half a cosine."""
    if not 0 < warmup < math.inf:
        raise ConfigError(f"warmup_cosine takes a warm-up of more than 0 epochs, got {warmup}")
    warmup = min(warmup, epochs / 2)
    fall = jnp.clip((epoch - warmup) / (epochs - warmup), 0, 1)
    return peak * jnp.minimum(epoch / warmup, (1 + jnp.cos(jnp.pi * fall)) / 2)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a file, with `overrides` of the form "key=value" put over it."""
    path = Path(path)
    if not path.is_file():
        known = {file.stem: file for file in sorted((Path(__file__).parent / "configs").glob("[!_]*.py"))}
        near = difflib.get_close_matches(path.stem, known, n=1) or ["quick"]
        raise ConfigError(f"no config file {path}; give the path of a Python file, such as {known[near[0]]}")
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))  # whatever the file's ending
    try:
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(path.stem, loader))
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"config file {path} does not run: {type(error).__name__}: {error}") from error
    values = getattr(module, "config", None)
    if not isinstance(values, Mapping):
        raise ConfigError(f"config file {path} must define `config = dict(network=..., ...)`; its config is {values!r}")
    values = dict(values)
    for key, value in map(_override, overrides):
        if key.startswith("network."):
            key, value = "network", _with_option(values.get("network"), key.removeprefix("network."), value)
        values[key] = value
    return make(values)


def make(values: Mapping[str, Any]) -> Config:
    """A checked `Config` from a dict of its fields."""
    for key in values:
        _field(key)
    if "network" not in values:
        raise ConfigError("the config has no network; add network=<a flax.linen module>")
    return Config(**values)


def describe(value) -> Any:
    """`value` as JSON data that is equal for equal configs: functions by name, modules and configs by fields."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, functools.partial):
        return {"function": describe(value.func), "arguments": describe([*value.args, dict(value.keywords)])}
    if isinstance(value, nn.Module):
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name")]
        return {"module": describe(type(value))} | {name: describe(getattr(value, name)) for name in fields}
    if isinstance(value, Config):
        return {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Group):
        return f"{value!r} {hashlib.sha256((value.elements.round(9) + 0.0).tobytes()).hexdigest()[:8]}"
    if callable(value) and hasattr(value, "__name__"):
        name = f"{value.__module__}.{value.__name__}"
        return {"function": name, "closure": describe(kept)} if (kept := closure(value)) else name
    if callable(value) and getattr(value, "__dict__", None):
        return {"object": describe(type(value))} | {name: describe(item) for name, item in sorted(vars(value).items())}
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def closure(function) -> list:
    """The values that a function has kept of where it was made."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != types.CellType()]


def _field(key: str) -> dataclasses.Field:
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if key in fields:
        return fields[key]
    near = difflib.get_close_matches(str(key), fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "the keys are " + ", ".join(fields)
    raise ConfigError(f"unknown config key {key!r}; {hint}")


def _override(text: str) -> tuple[str, Any]:
    """("key", value) from "key=value"; the value is a Python literal, or text where the field takes text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set takes key=value, got {text!r}")
    kind = Any if key.startswith("network.") else _field(key).type
    if key == "dataset":
        return key, value
    if Callable in (kind, *typing.get_args(kind)) and float not in typing.get_args(kind) or kind in (nn.Module, Mapping):
        raise ConfigError(f"--set cannot give {key}, which is a Python object; write a config file that sets it")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return key, value


def _with_option(network, option: str, value):
    """The network with another value of one of its options."""
    options = [field.name for field in dataclasses.fields(network)] if isinstance(network, nn.Module) else []
    if option not in options or option in ("parent", "name"):
        words = ", ".join(name for name in options if name not in ("parent", "name"))
        raise ConfigError(f"the network {type(network).__name__} has no option {option!r}; it has {words or 'none'}")
    return network.clone(**{option: value})


def _checked(field: dataclasses.Field, value):
    """`value` if it has the field's type (an int becomes a float where that is asked), else a ConfigError."""
    kinds = typing.get_args(field.type) or (field.type,)
    if typing.get_origin(field.type) is Literal:
        if any(value is kind or isinstance(kind, str) and value == kind for kind in kinds):
            return value
        raise ConfigError(f"{field.name} is {value!r}; it must be one of {', '.join(map(repr, kinds))}")
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigError(f"{field.name} is {value!r} of type {type(value).__name__}; it must be {names}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field.name} is {value}; it must be a finite number")
    if field.name in _AT_LEAST and value is not None and value < _AT_LEAST[field.name]:
        raise ConfigError(f"{field.name} is {value}; it must be at least {_AT_LEAST[field.name]}")
    if type(value) is int and value > _LARGEST:
        raise ConfigError(f"{field.name} is {value}; it must be at most {_LARGEST}")
    if field.name in _BELOW and value >= _BELOW[field.name]:
        raise ConfigError(f"{field.name} is {value}; it must be below {_BELOW[field.name]}")
    return value
