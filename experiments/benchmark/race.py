"""The parts of the benchmark: which programs meet, and the numbers of a row."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import pdo_jax as pdo
from experiments import main, programs, workdir
from experiments.benchmark import cases, peers, tables, timing
from experiments.benchmark.cases import FULL, QUICK, Sizes, Task
from pdo_jax import export

ROOT = Path(__file__).parents[2]
DENSE_PEER, PEERS = ("torch",), ("torch", "escnn", "e2cnn")
STEP_PEERS = ("torch", "torch.compile", "escnn", "e2cnn")
ALONE = "auto, without compiler_options"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says; `python` is that of the peers, None for none."""

    networks: Sequence[str]
    dtypes: Sequence[str] = ("float32", "bfloat16")
    lowerings: Sequence[str] = ()  # empty: those of each part
    runs: int = 10
    python: str | None = None
    profile: Path | None = None
    sizes: Sizes = FULL

    def race(self, case: Mapping, programs: Mapping, requests: Sequence[Mapping], reference: str = "auto") -> list[dict]:
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"  # torch's name for ROCm too
        requests = [{"device": device} | request for request in requests if self.python]
        return timing.race(case, programs, requests, self.python, self.runs, reference, self.profile)


matmul_peak = functools.cache(timing.matmul_peak)


# Layers


def layers(options: Options) -> Iterator[list[dict]]:
    group = pdo.groups.cyclic(8)
    for (channels, batch, size), dtype in itertools.product(options.sizes.layers, options.dtypes):
        width = channels * group.order
        programs = cases.group_layers(group, channels, batch, size, dtype, options.lowerings or pdo.lowering.LOWERINGS)
        equal = round(math.sqrt(programs["auto", "training"].facts["parameters"] / 25))
        for name, features in (("Flax, equal channels", width), ("Flax, equal parameters", equal)):
            conv = nn.Conv(features, (5, 5), use_bias=False, dtype=dtype)
            programs |= cases.layer_programs(name, conv, (batch, size, size, features))
        requests = [cases.layer_case(peer, group, channels, batch, size, dtype) for peer in PEERS]
        rows = options.race({"case": f"{width} channels, {batch} × {size}²", "dtype": dtype}, programs, requests)
        for row in rows:
            if "median" in row and row["program"] != "Flax, equal parameters":
                passes = 3 if row["mode"] == "training" else 1
                row["dense_flops_per_second"] = passes * 2 * 25 * width**2 * batch * size**2 / row["median"]
                row["of_peak"] = row["dense_flops_per_second"] / matmul_peak(dtype, options.sizes.matmul, options.runs)
        yield rows


def growth(options: Options) -> Iterator[list[dict]]:
    for dtype, order in itertools.product(options.dtypes, options.sizes.orders):
        group, shape = pdo.groups.cyclic(order), options.sizes.growth
        programs = cases.group_layers(group, *shape, dtype, options.lowerings or pdo.lowering.LOWERINGS, ["training"])
        requests = [cases.layer_case(peer, group, *shape, dtype) for peer in DENSE_PEER]
        yield options.race({"order": order, "dtype": dtype}, programs, requests)


# Networks


def steps(options: Options) -> Iterator[list[dict]]:
    for name, dtype in itertools.product(options.networks, options.dtypes):
        task, programs = options.sizes.tasks[name], {}
        given = cases.setting(task, dtype)
        variants = {lowering: (cases.setting(task, dtype, lowering=lowering), 0) for lowering in ("auto", *options.lowerings)}
        if task.loop:  # as an epoch runs
            variants[f"auto, {task.loop} steps in a loop"] = given, task.loop
        state = cases.state(given, task.shape)
        for label, (variant, loop) in variants.items():
            programs[label, "training"] = cases.step_program(variant, task.shape, state, loop)
        if pdo.compiler_options():  # what they gain
            programs[ALONE, "training"] = cases.step_program(given, task.shape, state, options={})
        for label, network in cases.baselines(given.network, task.shape).items():
            plain = dataclasses.replace(given, network=network)
            programs[label, "training"] = cases.step_program(plain, task.shape, cases.state(plain, task.shape))
        requests = [cases.network_case(peer, "training step", given, task) for peer in STEP_PEERS]
        rows = options.race({"case": f"{name}, batch {task.batch}", "dtype": dtype}, programs, requests)
        for row in rows:
            if row["program"] == "auto":
                row["peak_bytes"] = fresh(task, dtype)["peak_bytes"]
            if "median" in row:
                row["examples_per_second"] = task.batch / row["median"]
        yield rows


def inference(options: Options) -> Iterator[list[dict]]:
    task = options.sizes.tasks["MnistRotNet"]
    for dtype in options.dtypes:
        given, programs = cases.setting(task, dtype), {}
        network = given.network.clone(dtype=dtype)
        variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *task.shape)))
        plain, folded = export.to_plain(network, variables, (1, *task.shape))
        for batch in options.sizes.batches:
            images = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *task.shape)), jnp.float32)
            calls = {"folded": (plain.clone(lowering="auto").apply, folded), "plain convolutions": (plain.apply, folded),
                     "not folded": (network.apply, variables)}
            if batch > (part := options.sizes.part):
                calls |= {f"{name}, {part} at a time": (cases.in_parts(call, part), values)
                          for name, (call, values) in calls.items() if name != "plain convolutions"}
            for name, (call, values) in calls.items():
                program = timing.program(timing.free_layout(call), values, images)
                program.facts["parameters"] = cases.parameters(values)
                programs[name, f"batch {batch}"] = program
            if dtype == "float32" and importlib.util.find_spec("jax2onnx") and jax.default_backend() == "cpu":
                programs["ONNX Runtime", f"batch {batch}"] = timing.Program(in_onnx(plain, folded, images), {})
        requests = [cases.network_case(peer, "inference", given, task, batches=options.sizes.batches) for peer in DENSE_PEER]
        rows = options.race({"case": "MnistRotNet", "dtype": dtype}, programs, requests, reference="folded")
        for row in rows:
            if "median" in row:
                row["examples_per_second"] = int(row["mode"].split()[1]) / row["median"]
        yield rows


def in_onnx(plain, folded, images):
    """The folded network in ONNX Runtime, with its own choice of threads."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # it tells of each constant that it folds away
    session = onnxruntime.InferenceSession(export.to_onnx(plain, folded, (None, *images.shape[1:])), settings)
    images = np.asarray(images)

    def run():
        began = time.perf_counter()
        session.run(None, {"x": images})
        return time.perf_counter() - began

    return run


# Fresh processes


def construct(options: Options) -> Iterator[list[dict]]:
    code = ("import time; a = time.perf_counter(); import flax.linen; b = time.perf_counter(); import pdo_jax; "
            "print([b - a, time.perf_counter() - b])")
    below, own = map(statistics.median, zip(*(child(code) for _ in range(min(options.runs, 5))), strict=True))
    yield [{"case": "import pdo_jax", "dtype": "", "import_seconds": below + own, "own_import_seconds": own}]
    for name, dtype in itertools.product(options.networks, options.dtypes):
        yield [{"case": name, "dtype": dtype} | fresh(options.sizes.tasks[name], dtype)]


def fresh(task: Task, dtype: str) -> dict:
    """What `first_steps` measures, in a process of its own."""
    return once(f"from experiments.benchmark.race import Task, first_steps; first_steps({task!r}, {dtype!r})")


def child(code: str):
    """The JSON that a new Python prints last; without a compilation cache."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"a fresh process ended with code {ended.returncode}:\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


once = functools.cache(child)


def first_steps(task: Task, dtype: str):
    """Prints the seconds from constructing a network to its first step, and the peak of memory in the steps after it."""
    main.spare()
    began = time.perf_counter()
    given = cases.setting(task, dtype)
    jitted, data = cases.step(given, task.shape)
    abstract = jax.eval_shape(lambda: programs.new_state(given, cases.model(given, task.shape), task.shape))
    facts = {"construct_seconds": time.perf_counter() - began}
    compiled, compilation = timing.compile_program(jitted, abstract, *data)
    began = time.perf_counter()
    state = jax.block_until_ready(cases.state(given, task.shape))
    facts["initialise_seconds"] = time.perf_counter() - began
    run_once = timing.runner(compiled, (state, *data), carry=True)
    facts["first_step_seconds"] = run_once()
    peers.forget_peak_memory()
    for _ in range(2):
        run_once()
    on_device = jax.devices()[0].memory_stats()  # None on a CPU
    peak = on_device["peak_bytes_in_use"] if on_device else peers.peak_memory()
    print(json.dumps(facts | compilation | {"peak_bytes": peak}))


# The command


PARTS = {"layers": layers, "steps": steps, "growth": growth, "inference": inference, "construct": construct}


def run(options: Options, parts: Sequence[str], out: Path, command: str) -> dict:
    """Measures the parts; the files in `out` are whole after every case."""
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "command": command, "quick": options.sizes is QUICK, "runs": options.runs, "peer_python": options.python,
        "processor": processor(), "load": os.getloadavg()[0], "surroundings": workdir.surroundings(),
        "peaks": {dtype: matmul_peak(dtype, options.sizes.matmul, options.runs) for dtype in options.dtypes}, "parts": {},
    }
    for part in parts:
        rows = results["parts"][part] = []
        for more in PARTS[part](options):
            rows += more
            if part == "growth":
                results["slopes"] = tables.slopes(rows)
                tables.draw_growth(rows, out / "growth.png")
            workdir.write_json(out / "benchmark.json", results)
            workdir.write_text(out / "benchmark.md", tables.markdown(results))
            print(f"{part}: {', '.join(str(value) for value in list(more[0].values())[:2])}", file=sys.stderr, flush=True)
    return results


def processor() -> str:
    """The name of the CPU, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
