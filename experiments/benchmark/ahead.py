"""Training steps compiled for TPUs that are not there: what the TPU's own compiler makes of them, and what it estimates.

    python -m experiments.benchmark --tpu v5e:2x2          # needs `pip install libtpu`, and no TPU

The program is the one that `train` runs, data parallel over all devices of the topology, its data set on each of them.
Nothing is run: a time in these tables is the compiler's estimate, not a measurement.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pdo_jax as pdo
from experiments import config, programs
from experiments.benchmark import cases

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v5e:16x16")
"""Those that are known to work; libtpu takes others of the same form."""
CONFIGS = {"MnistRotNet": "mnist_rot"} | {name: f"cifar10_{name}" for name in pdo.networks.PAPER if name != "mnist_rot"}
"""Network -> the file in `configs` with the paper's way to train it."""
TRAIN_IMAGES = {"mnist_rot": (12_000, 28, 28, 1), "cifar10": (50_000, 32, 32, 3)}
PROGRAMS = (("bfloat16", None), ("float32", None), ("bfloat16", 4))
"""(dtype, steps in a compiled loop, or None for one step alone)."""
ENVIRONMENT = {  # what libtpu would ask a TPU's host for; the last lets it in beside other processes that have loaded it
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-[a-z]+)(?:-start)?\(")


def report(topology: str, networks: Sequence[str] | None = None, batch: int = 128, programs=PROGRAMS) -> list[dict]:
    """A row for every network of the paper, or those named, and every program; see `measure`. Minutes for each ResNet.

    Every device takes `batch` images of a step, fewer where the train set does not have so many for all of them.

    Raises:
      ConfigError: a name that is not known, or libtpu is not installed; before anything is compiled.
    """
    names = list(CONFIGS if networks is None else networks)
    if unknown := [name for name in names if name not in CONFIGS]:
        raise config.ConfigError(f"unknown network {unknown[0]!r}; the networks are {', '.join(CONFIGS)}")
    mesh, rows = Mesh(devices(topology), ("data",)), []
    for name in names:
        file = CONFIGS[name]
        images = next(shape for data, shape in TRAIN_IMAGES.items() if file.startswith(data))
        size = min(batch, images[0] // mesh.size) * mesh.size
        for dtype, steps in programs:
            settings = config.load(cases.CONFIGS / f"{file}.py", [f"dtype={dtype}", f"batch_size={size}"])
            rows.append({"network": name, "topology": topology} | measure(settings, images, mesh, steps))
    return rows


def measure(settings: config.Config, images: Sequence[int], mesh: Mesh, steps: int | None = None) -> dict:
    """Compiles a config's training step, or a loop over `steps` of them, for the mesh's devices; what the compiler says.

    Numbers are for one device and one step; `images` is the shape [n, *space, channels] of the train set. The compiler's
    cost analysis counts the body of a loop once, so that a loop's numbers are those of a step and of what precedes the loop.
    """
    began = time.perf_counter()
    lowered = lower(settings, images, mesh, steps)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - traced
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    estimate, without = estimated(cost["optimal_seconds"])
    return {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "dtype": settings.dtype,
        "program": f"loop of {steps}" if steps else "step",
        "batch_per_device": settings.batch_size // mesh.size,
        "trace_seconds": traced - began,
        "compile_seconds": seconds,
        "estimated_seconds": estimate,
        "operations_without_estimate": without,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "bytes_held": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        "collectives": collectives(compiled),
        "compiler": f"jax {jax.__version__}, libtpu {_libtpu_version()}",
    }


def lower(settings: config.Config, images: Sequence[int], mesh: Mesh, steps: int | None = None) -> jax.stages.Lowered:
    """The program that `train` would run on the mesh, before XLA: one step, or a compiled loop over `steps` batches."""
    n, *shape = images
    half = np.full(shape[-1], 0.5)  # in place of the data's moments
    model = programs.make_model(settings, half, half)
    step = programs.step_function(settings, model, max(1, n // settings.batch_size), mesh.size)
    program = programs.repeated(step, True, "jit", mesh) if steps else programs.mapped(step, "jit", mesh)
    state = jax.eval_shape(lambda: programs.new_state(settings, model, shape))
    rows = (steps, settings.batch_size) if steps else (settings.batch_size,)
    data = [jax.ShapeDtypeStruct(*of) for of in (((n, *shape), jnp.float32), ((n,), jnp.int32), (rows, jnp.int32))]
    everywhere = NamedSharding(mesh, PartitionSpec())
    return program.lower(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), (state, *data)))


def devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology such as "v5e:2x2", to compile for; on v4 a device is one of a chip's two cores."""
    if not (os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu")):
        raise config.ConfigError(f"to compile for {topology!r} the TPU's compiler is needed; pip install libtpu")
    no_tpu = "TPU_SKIP_MDS_QUERY" in os.environ  # set by jax where it finds none; a TPU's host needs no settings
    missing = {name: value for name, value in ENVIRONMENT.items() if no_tpu and name not in os.environ}
    os.environ.update(missing)  # libtpu reads them when it is loaded
    try:
        return topologies.get_topology_desc(topology or "none", "tpu").devices  # "" would be libtpu's default
    except jax.errors.JaxRuntimeError as error:
        known = ", ".join(TOPOLOGIES)
        raise config.ConfigError(f"libtpu gives no topology {topology!r}: {error}. Known to work: {known}") from error
    finally:
        for name in missing:
            del os.environ[name]


def estimated(optimal_seconds: float) -> tuple[float, int]:
    """(seconds, operations without an estimate): the compiler takes 1 s off its sum for every one of these.

    Right for programs of less than a second; the sum is in float32, so good to about n · 1e-7 s.
    """
    without = max(0, -math.floor(optimal_seconds))
    return optimal_seconds + without, without


def collectives(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """How many operations of each kind of communication a compiled program has; None if jaxlib cannot read it.

    That happens to some programs of libtpu 0.0.52 for v5p and v6e, in jaxlib 0.10.2.
    """
    try:
        program = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None
    return dict(sorted(Counter(COLLECTIVE.findall(program)).items()))


def markdown(rows: Sequence[dict]) -> str:
    """A table of rows as `report` makes them."""
    head = ("topology", "network", "dtype", "program", "batch per device", "compile s", "step ms, compiler's estimate",
            "operations without one", "GFLOP", "GB accessed", "MB held", "collectives")
    lines = [head, ["---"] * len(head)]
    for row in rows:
        used = row["collectives"]
        used = "not readable" if used is None else ", ".join(f"{count} {kind}" for kind, count in used.items()) or "none"
        lines.append((
            f"{row['topology']} ({row['devices']})", row["network"], row["dtype"], row["program"], row["batch_per_device"],
            f"{row['compile_seconds']:.0f}", f"{1e3 * row['estimated_seconds']:.2f}", row["operations_without_estimate"],
            f"{row['flops'] / 1e9:.1f}", f"{row['bytes_accessed'] / 1e9:.2f}", f"{row['bytes_held'] / 1e6:.0f}", used))
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    compilers = "; ".join(sorted({row["compiler"] for row in rows}))
    return f"{table}\n\nFor one device and one step, nothing was run: times are the compiler's estimates ({compilers})."


def _libtpu_version() -> str:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return f"at {os.environ.get('TPU_LIBRARY_PATH')}"
