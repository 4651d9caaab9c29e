"""The training loop: from a `Config` to a folder with checkpoints, metrics, figures and a result.

The data set lives on every device. An epoch is one compiled program over a permutation of the train set; each device
takes its share of every batch, and gradients, batch statistics and metrics are averaged over the mesh axis "data".
Everything random is a function of the seed and of the step number, so that a run that was killed and started again
ends with the same bits as one that was not (same devices; a GPU needs XLA_FLAGS=--xla_gpu_deterministic_ops=true).
The test set is evaluated once, after the last epoch.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import pdo_jax as pdo
from experiments import check, datasets, figures, record
from experiments.config import Config, describe
from experiments.datasets import augment
from experiments.measures import equivariance_error, error_rate
from experiments.workdir import (
    Board,
    TrainError,
    append_line,
    checkpoint_manager,
    opened,
    read_history,
    read_json,
    restore,
    save,
    saved_epochs,
    surroundings,
    write_json,
    writing,
)

SPLITS = ("train", "validation", "test")
RESULT = {"test_error": float, "test_loss": float, "dataset": str, "dataset_note": str, "images": dict, "parameters": int,
          "figures": list}  # what is read of a result again


class State(NamedTuple):
    """All that changes in training, and all that a checkpoint holds."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any
    """The running average of params and batch_stats, under these keys, if the config has `ema`; else empty."""

    @property
    def variables(self):
        """What is evaluated."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


class Model(NamedTuple):
    """The config's network in the config's dtype, and the train set's moments [channels]."""

    network: nn.Module
    mean: np.ndarray
    deviation: np.ndarray

    def logits(self, variables, images, **kwargs):
        return self.network.apply(variables, (images - self.mean) / self.deviation, **kwargs)


def train(
    config: Config,
    workdir: Path,
    data: datasets.Dataset | None = None,
    source: Mapping | None = None,
    minutes: float = math.inf,
    force: bool = False,
) -> dict | None:
    """Trains to the config's last epoch, on from the last checkpoint in `workdir` if there is one; returns the result.

    `data` stands in for the config's data set. `source` says where the config came from, {"file": path, "overrides": [...]}.
    No epoch is begun, nor the evaluation at the end, that would not end within `minutes` if it took as long as the first one,
    which is compiled, or the last: then None is returned, and all that was done is in the last checkpoint. `force` goes on with
    a run whose config, code, data, devices or versions have changed; the result tells so.
    """
    began = time.perf_counter()
    workdir, writes = Path(workdir).absolute(), jax.process_index() == 0
    with opened(workdir, writes):
        own = data is not None
        data = check.data(data if own else load_data(config))
        model = make_model(config, *augment.moments(data.train.images))
        known = record.of(config, data, source)
        record.agree(known)
        forced = record.resume(workdir, known, force)
        if (workdir / "result.json").exists():
            return read_json(workdir / "result.json", RESULT)
        shape, sizes = data.train.images.shape[1:], {name: len(getattr(data, name).labels) for name in SPLITS}
        mesh = all_devices()
        check.run(config, model, data, mesh)
        if writes:
            values = data.train.images
            inputs = {"shape": shape, "mean": model.mean.tolist(), "deviation": model.deviation.tolist(),
                      "range": [float(values.min()), float(values.max())], "own": own}
            with writing(workdir / "config.json", workdir):
                write_json(workdir / "config.json", {"record": known, "input": inputs, "forced": forced, "source": source})

        state = place(mesh, initial_state(config, model, shape))
        train_epoch, scan = epoch_program(config, model, data.train, mesh, state)
        evaluate = evaluation_program(config, model, data.num_classes, mesh)
        done = max(saved_epochs(workdir), default=0)
        state = restore(workdir, done, state) if done else state
        state, history = run_epochs(config, workdir, state, done, mesh, train_epoch, evaluate, data, began, minutes)
        if len(history) < config.epochs or not time_for_more(began, minutes, history):
            return None

        confusion, loss = evaluate(state.variables, data.test)
        result = {
            "test_error": error_rate(confusion),
            "test_loss": loss,
            "validation_error": history[-1].get("validation_error"),
            "train_loss": history[-1]["train_loss"],
            "dataset": data.name,
            "dataset_note": data.note,
            "images": sizes,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "train_seconds": sum(line["seconds"] for line in history),
        }
        if writes:
            variables = jax.device_get(state.variables)
            result["equivariance_error"] = equivariance_error(model, variables, data.test.images[:64])
            with writing(workdir, workdir):
                result["figures"] = figures.draw(workdir / "figures", history, confusion, model.network, variables, shape)
                result |= {"wall_seconds": time.perf_counter() - began, "scan": scan} | surroundings()
                result |= {"forced": forced} if forced else {}
                result["config"] = describe(config)
                write_json(workdir / "result.json", result)
        return result


def run_epochs(config, workdir, state, done, mesh, train_epoch, evaluate, data, began, minutes):
    """The epochs after `done`: each is a line of metrics.jsonl and a checkpoint. The last state, and all lines."""
    writes = jax.process_index() == 0
    history = read_history(workdir, done, writes)
    progress = tqdm(total=config.epochs, initial=done, unit="epoch", disable=not writes)
    with checkpoint_manager(workdir) as manager, contextlib.closing(Board(workdir, history, writes)) as board, progress as bar:
        for epoch in range(done + 1, config.epochs + 1):
            if not time_for_more(began, minutes, history):
                break
            epoch_began = time.perf_counter()
            state, metrics = train_epoch(state, epoch)
            if not all(map(math.isfinite, metrics.values())):
                kept = f"The checkpoint of epoch {epoch - 1} is kept, in {workdir / 'checkpoints'}. " if epoch > 1 else ""
                raise TrainError(
                    f"training diverged in epoch {epoch}: {metrics}. {kept}Lower the learning rate, or look for bad numbers in "
                    "the data."
                )
            if len(data.validation.labels):
                confusion, loss = evaluate(state.variables, data.validation)
                metrics |= {"validation_loss": loss, "validation_error": error_rate(confusion)}
            history.append({"epoch": epoch, **metrics, "seconds": time.perf_counter() - epoch_began})
            with writing(workdir, workdir):
                manager.wait_until_finished()  # so that metrics.jsonl is never ahead of the checkpoints by more than a line
                if writes:  # before the checkpoint, so that a run that resumes from it has all its lines
                    append_line(workdir / "metrics.jsonl", history[-1])
                board.add(history[-1])
                save(manager, epoch, place(mesh, jax.tree.map(np.array, state)))
            bar.set_postfix({name: f"{value:.4f}" for name, value in metrics.items() if name.endswith("error")})
            bar.update()
        with writing(workdir / "checkpoints", workdir):
            manager.wait_until_finished()
    return state, history


def time_for_more(began: float, minutes: float, history: Sequence[Mapping]) -> bool:
    """Whether an epoch as long as the first or the last one would end within `minutes`; process 0 decides for all."""
    seconds = time.perf_counter() - began + max((line["seconds"] for line in [*history[:1], *history[-1:]]), default=0)
    return minutes == math.inf or bool(multihost_utils.broadcast_one_to_all(np.bool_(seconds < 60 * minutes)))


# What runs on the devices


def step_function(config: Config, model: Model, steps_per_epoch: int, devices: int) -> Callable:
    """One update on the images at `rows` [batch], as one device sees it: it takes its share of the rows."""
    if hasattr(model.network, "axis_name"):
        model = model._replace(network=model.network.clone(axis_name="data"))
    elif devices > 1:
        name = type(model.network).__name__
        raise TrainError(f"{name} has no field axis_name, so its batch statistics would differ on {devices} devices")
    optimiser = make_optimiser(config, steps_per_epoch)

    @functools.partial(jax.jit, inline=True)  # so that it is traced once: to be tried, to be looked at, and to be run
    def step(state, images, labels, rows):
        device = lax.axis_index("data")
        rows = rows.reshape(devices, -1)[device]
        x, y = images[rows], labels[rows]
        key = jax.random.fold_in(jax.random.fold_in(keys(config)[1], state.step), device)
        augment_key, dropout_key = jax.random.split(key)
        if config.augment:
            x = config.augment(augment_key, x)

        def loss_function(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": dropout_key}}
            logits, changed = model.logits(variables, x, **options)
            logits = logits.astype(jnp.float32)
            targets = optax.smooth_labels(jax.nn.one_hot(y, logits.shape[-1]), config.label_smoothing)
            loss = optax.softmax_cross_entropy(logits, targets).mean() + config.l2 / 2 * squared_weights(params)
            return loss, (changed.get("batch_stats", {}), jnp.mean(logits.argmax(-1) != y))

        params = apart(state.params, device)
        (loss, (batch_stats, error)), gradients = jax.value_and_grad(loss_function, has_aux=True)(params)
        gradients, loss, error = lax.pmean((gradients, loss, error), "data")
        batch_stats = jax.tree.map(lambda x: lax.pmean(x, "data") if varying(x) else x, batch_stats)  # without an axis_name
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = State(state.step + 1, params, batch_stats, opt_state, {})
        if config.ema:
            share = jnp.maximum(1 - config.ema, 9 / (10 + state.step))
            new = new._replace(average=optax.incremental_update(new.variables, state.average, share))
        return new, {"train_loss": loss, "train_error": error}

    return step


def epoch_program(config: Config, model: Model, split: datasets.Split, mesh: Mesh, state: State):
    """(A function of state and epoch, counted from 1, that gives state and metrics; whether it is a compiled loop)."""
    steps = len(split.labels) // config.batch_size
    step = step_function(config, model, steps, mesh.size)
    images, labels = place(mesh, split)
    scan = config.scan
    if scan == "auto":
        rows = np.zeros(config.batch_size, np.int32)
        scan = jax.default_backend() != "cpu" or not uses_convolution(step, mesh, state, images, labels, rows)
    run = repeated(step, scan, config.parallel, mesh)
    weight_norm = jax.jit(optax.tree.norm)

    def train_epoch(state, epoch):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(split.labels)).astype(np.int32)
        order = order[: steps * config.batch_size].reshape(steps, config.batch_size)
        state, metrics = run(state, images, labels, order)
        metrics = {name: float(np.mean(values, dtype=np.float64)) for name, values in jax.device_get(metrics).items()}
        metrics["weight_norm"] = float(weight_norm(state.params))
        return state, metrics | {"learning_rate": float(rate(config, epoch - 1 / steps))}

    return train_epoch, scan


def varying(x) -> tuple[str, ...]:
    """The axes over whose devices x may differ, as far as `jax.shard_map` follows that; `jax.pmap` does not."""
    return tuple(jax.typeof(x).manual_axis_type.varying)


def apart(tree, device):
    """Copies that belong to each device alone, so that gradients with respect to them are those of its own loss."""
    return jax.tree.map(lambda x: lax.pcast(x, varying(device), to="varying"), tree) if varying(device) else tree


def uses_convolution(step: Callable, mesh: Mesh, *arguments) -> bool:
    return "stablehlo.convolution" in mapped(step, "jit", mesh).lower(*arguments).as_text()


def evaluation_program(config: Config, model: Model, num_classes: int, mesh: Mesh) -> Callable:
    """A function of (variables, split) that gives the counts [class, predicted class] and the mean cross entropy.

    The batches come from the host, padded to one size, so that one compiled program serves every split.
    """

    def count(variables, images, labels):
        device = lax.axis_index("data")
        x, y = images.reshape(mesh.size, -1, *images.shape[1:])[device], labels.reshape(mesh.size, -1)[device]
        logits = model.logits(variables, x, train=False).astype(jnp.float32)
        loss = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, y), where=y >= 0)
        confusion = jnp.zeros((num_classes, num_classes), jnp.int32).at[y, logits.argmax(-1)].add(y >= 0)
        return lax.psum((confusion, loss), "data")

    compiled = mapped(count, config.parallel, mesh, donate=False)

    def evaluate(variables, split):
        batch = -(-min(config.eval_batch_size, max(512, len(split.labels))) // mesh.size) * mesh.size
        counts = []
        for start in range(0, len(split.labels), batch):
            images, labels = split.images[start : start + batch], split.labels[start : start + batch]
            missing = batch - len(labels)  # label -1: no image
            images = np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
            labels = np.pad(labels, (0, missing), constant_values=-1)
            counts.append(one_by_one(mesh, compiled(variables, images, labels)))
        confusions, losses = zip(*jax.device_get(counts), strict=True)
        return sum(confusions), float(sum(losses)) / len(split.labels)

    return evaluate


def repeated(function: Callable, scan: bool, parallel: str, mesh: Mesh) -> Callable:
    """`function(carry, *data, rows)` for every row of an order, as a compiled loop or a Python loop, on all devices."""
    if scan:

        def loop(carry, *data):
            *data, order = data
            return lax.scan(lambda carry, rows: function(carry, *data, rows), carry, order)

        return mapped(loop, parallel, mesh)
    compiled = mapped(function, parallel, mesh)

    def python_loop(carry, *data):
        *data, order = data
        outputs = []
        for rows in order:
            carry, output = one_by_one(mesh, compiled(carry, *data, rows))
            outputs.append(output)
        return carry, jax.tree.map(lambda *leaves: np.stack(jax.device_get(leaves)), *outputs)

    return python_loop


def one_by_one(mesh: Mesh, outputs):
    """Several CPU devices of one process share its threads: of many collective programs under way each may hold some, and none
    all that it needs, until XLA ends the process. So there the next one waits for the last."""
    return jax.block_until_ready(outputs) if mesh.devices.flat[0].platform == "cpu" and mesh.size > 1 else outputs


def mapped(function: Callable, parallel: str, mesh: Mesh, donate: bool = True, options: Mapping | None = None) -> Callable:
    """`function` compiled for all devices, with equal arguments and results on each; the first argument is donated."""
    options = pdo.compiler_options(mesh.devices.flat[0].platform) if options is None else dict(options)
    if parallel == "jit":
        same = PartitionSpec()
        everywhere = jax.shard_map(function, mesh=mesh, in_specs=same, out_specs=same)
        return jax.jit(everywhere, donate_argnums=0 if donate else (), compiler_options=options)
    devices = np.arange(jax.local_device_count())  # pmap wants an argument that differs between devices
    everywhere = jax.pmap(
        lambda _, first, rest: function(first, *rest),
        axis_name="data",
        in_axes=(0, None, None),
        out_axes=None,
        donate_argnums=1 if donate else (),
    )
    programs = []

    def call(first, *rest):
        if not programs:
            programs.append(everywhere.lower(devices, first, rest).compile(options))
        return programs[0](devices, first, rest)

    return call


def all_devices() -> Mesh:
    return jax.make_mesh((jax.device_count(),), ("data",))


def place(mesh: Mesh, tree):
    """A copy of every array of `tree` on every device of the mesh, also where the mesh spans several processes."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x), np.shape(x)), tree)


# The model, its loss and its optimiser


def load_data(config: Config) -> datasets.Dataset:
    try:
        return datasets.load(config.dataset, validation=config.validation, data_dir=config.data_dir)
    except ValueError as error:
        raise TrainError(str(error)) from error


def make_model(config: Config, mean, deviation) -> Model:
    network = config.network
    if hasattr(network, "dtype"):
        network = network.clone(dtype=config.dtype)
    elif config.dtype != "float32":
        raise TrainError(f"{type(network).__name__} has no field dtype, so it cannot compute in {config.dtype}")
    return Model(network, np.asarray(mean, np.float32), np.asarray(deviation, np.float32))


def initial_state(config: Config, model: Model, image_shape) -> State:
    quickly = {"xla_backend_optimization_level": 1}  # it runs once: the same numbers from half the compilation
    return jax.jit(lambda: new_state(config, model, image_shape), compiler_options=quickly)()


def new_state(config: Config, model: Model, image_shape) -> State:
    """`initial_state`, to trace: `jax.eval_shape` of it gives the shapes."""
    return state_of(config, new_variables(model, keys(config)[0], image_shape))


def state_of(config: Config, variables: Mapping) -> State:
    """The state before the first step."""
    state = State(jnp.int32(0), **variables, opt_state=make_optimiser(config, 1).init(variables["params"]), average={})
    return state._replace(average=jax.tree.map(jnp.copy, state.variables)) if config.ema else state


def new_variables(model: Model, key, image_shape) -> dict:
    """Initial params and batch_stats, which may be empty."""
    return {"batch_stats": {}} | model.network.init(key, jnp.zeros((1, *image_shape)), train=False)


def keys(config: Config):
    """Two random keys: for the initial weights, and for all that happens in the steps."""
    return jax.random.split(jax.random.key(config.seed))


def make_optimiser(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    return config.optimizer(lambda step: rate(config, step / steps_per_epoch))


def rate(config: Config, epoch):
    return jnp.asarray(config.learning_rate(epoch) if callable(config.learning_rate) else config.learning_rate)


def squared_weights(params) -> jax.Array:
    """The sum of squares of every parameter named "kernel"."""
    leaves = jax.tree.leaves_with_path(params)
    return sum(jnp.sum(jnp.square(leaf)) for path, leaf in leaves if path[-1].key == "kernel")
