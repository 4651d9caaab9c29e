"""What the benchmark measures: its sizes, and for each case the programs of ours and the request to the peers."""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import pdo_jax as pdo
from experiments import config, programs
from experiments.baselines import MnistRotCNN, ResNetCNN, UNetCNN
from experiments.benchmark import timing

CONFIGS = Path(__file__).parents[1] / "configs"


class Task(NamedTuple):
    """A network to train: its config, the images of a step, how many steps to run in one loop too, changes in the network.

    Targets are classes, or for fields [*space, channels, components] such fields."""

    file: str
    batch: int
    shape: tuple[int, ...]
    loop: int = 0
    changes: Mapping = {}


@dataclasses.dataclass(frozen=True)
class Sizes:
    layers: Sequence = ((7, 128, 24), (23, 128, 16), (45, 64, 8), (80, 32, 8))  # channels of p8, batch, points along an axis
    growth: tuple = (16, 32, 16)  # the same, for each of
    orders: Sequence[int] = (4, 6, 8, 12, 16, 24)
    tasks: Mapping = dataclasses.field(default_factory=lambda: {"MnistRotNet": Task("mnist_rot", 128, (28, 28, 1), 10)} | {
        name: Task(f"cifar10_{name}", 32, (32, 32, 3)) for name in pdo.networks.PAPER if name != "mnist_rot"} | {
        "UNet": Task("flow_p4m", 8, (64, 64, 1, 2))})
    batches: Sequence[int] = (1, 256)  # of inference
    part: int = 64  # of a batch that is worked off in parts, which stay nearer to the cores
    matmul: int = 2048


FULL = Sizes()
LARGE = Sizes(layers=((7, 1024, 24), (23, 1024, 16), (45, 512, 8), (80, 256, 8)), growth=(16, 256, 16), part=4096, matmul=8192,
              tasks={name: task._replace(batch=128, loop=10) for name, task in FULL.tasks.items()})  # for a GPU or TPU
QUICK = Sizes(layers=((1, 2, 6),), growth=(1, 2, 6), orders=(4, 6), batches=(1, 2), part=1, matmul=64, tasks={
    "MnistRotNet": Task("mnist_rot", 2, (28, 28, 1), 2, {"features": 1}),
    "p8_wide": Task("cifar10_p8_wide", 2, (8, 8, 3), 0, {"widths": (1, 2, 4), "blocks": 1}),
    "UNet": Task("flow_p4m", 2, (8, 8, 1, 2), 0, {"widths": (1, 2), "blocks": 1})})


# Layers


def group_layers(group, channels, batch, size, dtype, lowerings, modes=("forward", "training")) -> dict:
    made = {}
    for name in dict.fromkeys(["auto", *lowerings]):
        layer = pdo.GroupConv(channels, group, lowering=name, dtype=dtype)
        made |= layer_programs(name, layer, (batch, size, size, channels, group.order), modes)
    return made


def layer_programs(name: str, layer: nn.Module, shape, modes=("forward", "training")) -> dict:
    """A layer forward, and with both gradients; from and to the memory layout that the compiler chooses."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), layer.dtype)
    variables = jax.jit(layer.init)(jax.random.key(0), x[:1])

    def training(variables, x, cotangent):
        y, pullback = jax.vjp(layer.apply, variables, x)
        return y, pullback(cotangent)

    calls = {"forward": (layer.apply, variables, x), "training": (training, variables, x, x)}
    made = {(name, mode): timing.program(timing.free_layout(calls[mode][0]), *calls[mode][1:]) for mode in modes}
    for program in made.values():
        program.facts["parameters"] = parameters(variables)
    return made


def layer_case(peer: str, group, channels: int, batch: int, size: int, dtype: str) -> dict:
    case = {"peer": peer, "kind": "layer", "dtype": dtype, "features": channels, "batch": batch, "size": size}
    return case | symmetry(group)


def symmetry(group) -> dict:
    return {"order": group.order, "mirrored": bool((np.linalg.det(group.elements) < 0).any())}


# Networks


def setting(task: Task, dtype: str, **changes) -> config.Config:
    """The config that trains the network of a task, without augmentation."""
    given = config.load(CONFIGS / f"{task.file}.py")
    network = given.network.clone(**{**task.changes, **changes})
    return dataclasses.replace(given, network=network, batch_size=task.batch, dtype=dtype, augment=None)


def step(given: config.Config, shape, loop: int = 0, options: Mapping | None = None):
    """(The jitted training step of `experiments.programs`, or a loop of so many; its data). Its first argument is a state."""
    mesh, batch, random = programs.all_devices(), given.batch_size, np.random.default_rng(0)
    function = programs.step_function(given, model(given, shape), 1, mesh.size)
    jitted = programs.repeated(function, True, "jit", mesh) if loop else programs.mapped(function, "jit", mesh, options=options)
    images, labels = random.normal(size=(batch, *shape)).astype(np.float32), random.integers(0, 10, batch).astype(np.int32)
    labels = labels if len(shape) == 3 else images
    rows = np.arange(batch, dtype=np.int32)
    return jitted, (images, labels, np.tile(rows, (loop, 1)) if loop else rows)


def step_program(given: config.Config, shape, state: programs.State, loop: int = 0, options=None) -> timing.Program:
    jitted, data = step(given, shape, loop, options)
    program = timing.program(jitted, state, *data, carry=True, steps=loop or 1, options=options)
    program.facts["parameters"] = parameters(state.params)
    return program


def state(given: config.Config, shape) -> programs.State:
    return programs.initial_state(given, model(given, shape), shape)


def model(given: config.Config, shape) -> programs.Model:
    return programs.make_model(given, np.zeros(shape[-1]), np.ones(shape[-1]))


def in_parts(call: Callable, size: int) -> Callable:
    """A function of (variables, images [n, …]) that works off so many images at a time; n is a multiple of it."""
    return lambda variables, x: jax.lax.map(
        lambda part: call(variables, part), x.reshape(-1, size, *x.shape[1:])).reshape(len(x), -1)


def network_case(peer: str, kind: str, given: config.Config, task: Task, **more) -> dict:
    network = given.network
    fields = ("features", "dropout") if isinstance(network, pdo.networks.MnistRotNet) else ("widths", "blocks")
    case = {"peer": peer, "kind": kind, "network": type(network).__name__, "dtype": given.dtype, "l2": given.l2}
    case |= {"batch": task.batch, "size": task.shape[0], "channels": task.shape[-1]} | symmetry(network.group)
    return case | {name: getattr(network, name) for name in fields} | more


def baselines(network: nn.Module, shape) -> dict[str, nn.Module]:
    """Plain 3×3 Flax CNNs of the same layout: with as many channels as the fields have components, and as many parameters."""
    order = network.group.order
    if isinstance(network, pdo.networks.MnistRotNet):
        equal, make = MnistRotCNN(network.features * order), MnistRotCNN
    else:
        kind = UNetCNN if isinstance(network, pdo.networks.UNet) else ResNetCNN
        plain = functools.partial(kind, blocks=network.blocks)
        equal = plain(widths=tuple(width * order for width in network.widths))

        def make(width):
            return plain(widths=tuple(width * 2**stage for stage in range(len(network.widths))))

    width = matching_width(lambda width: count(make(width), shape), count(network, shape))
    return {"Flax, equal channels": equal, "Flax, equal parameters": make(width)}


def matching_width(count: Callable[[int], int], target: int) -> int:
    """The width >= 1 whose count, which grows with it, is nearest to the target."""
    above = bisect.bisect_left(range(512), target, lo=1, key=count)
    return min(above, max(above - 1, 1), key=lambda width: abs(count(width) - target))


def count(network: nn.Module, shape) -> int:
    return parameters(jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)))


def parameters(variables: Mapping) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", variables)))
