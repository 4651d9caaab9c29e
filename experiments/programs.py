"""What runs on the devices: the network's state, one step, an epoch of them, and the evaluation, each a compiled program.

The data set lives on every device. An epoch is one compiled program over a permutation of the train set; each device
takes its share of every batch, and gradients, batch statistics and metrics are averaged over the mesh axis "data".
Of a data set that is streamed each device is sent its share of every batch, in the same order, while the step before it runs.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pdo_jax as pdo
from experiments import datasets
from experiments.config import Config
from experiments.datasets import stream
from experiments.workdir import TrainError
from pdo_jax import kernels


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

    def outputs(self, variables, images, **kwargs):
        return self.network.apply(variables, (images - self.mean) / self.deviation, **kwargs)


def step_function(config: Config, model: Model, steps_per_epoch: int, devices: int) -> Callable:
    """One update on the images at `rows` [batch], as one device sees it: it takes its share of the rows. Without rows, on the
    images that it is given."""
    if hasattr(model.network, "axis_name"):
        model = model._replace(network=model.network.clone(axis_name="data"))
    elif devices > 1:
        name = type(model.network).__name__
        raise TrainError(f"{name} has no field axis_name, so its batch statistics would differ on {devices} devices")
    optimiser = make_optimiser(config, steps_per_epoch)

    @functools.partial(jax.jit, inline=True)  # so that it is traced once: to be tried, to be looked at, and to be run
    def step(state, x, y, rows=None):
        device = lax.axis_index("data")
        if rows is not None:
            rows = rows.reshape(devices, -1)[device]
            x, y = x[rows], y[rows]
        key = jax.random.fold_in(jax.random.fold_in(keys(config)[1], state.step), device)
        augment_key, dropout_key = jax.random.split(key)
        if config.augment and y.ndim > 1:
            x, y = config.augment(augment_key, x, y)
        elif config.augment:
            x = config.augment(augment_key, x)

        def loss_function(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": dropout_key}}
            outputs, changed = model.outputs(variables, x, **options)
            outputs, targets = outputs.astype(jnp.float32), y
            if config.label_smoothing:
                targets = optax.smooth_labels(jax.nn.one_hot(y, outputs.shape[-1]), config.label_smoothing)
            loss = config.loss(outputs, targets).mean() + config.l2 / 2 * squared_weights(params)
            return loss, (changed.get("batch_stats", {}), tallies(config, outputs, y, jnp.ones(len(y), bool)))

        params = apart(state.params, device)
        (loss, (batch_stats, counts)), gradients = jax.value_and_grad(loss_function, has_aux=True)(params)
        (gradients, loss), counts = lax.pmean((gradients, loss), "data"), lax.psum(counts, "data")
        batch_stats = jax.tree.map(lambda x: lax.pmean(x, "data") if varying(x) else x, batch_stats)  # without an axis_name
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = State(state.step + 1, params, batch_stats, opt_state, {})
        if config.ema:
            share = jnp.maximum(1 - config.ema, 9 / (10 + state.step))
            new = new._replace(average=optax.incremental_update(new.variables, state.average, share))
        return new, (loss, counts)

    return step


def epoch_program(config: Config, model: Model, split: datasets.Split, mesh: Mesh, state: State,
                  stack: contextlib.ExitStack | None = None):
    """(A function of state and epoch, counted from 1, that gives state and metrics; whether it is a compiled loop).

    What is streamed begins at the step of `state`, and ends with `stack`.
    """
    steps = len(split.labels) // config.batch_size
    step = step_function(config, model, steps, mesh.size)
    weight_norm = jax.jit(optax.tree.norm)
    if isinstance(split.images, stream.Images):
        scan, run = False, streamed(config, step, split, mesh, int(state.step), steps, stack)
    else:
        images, labels = place(mesh, split)
        scan = config.scan
        if scan == "auto":
            rows = np.zeros(config.batch_size, np.int32)
            scan = jax.default_backend() != "cpu" or not uses_convolution(step, mesh, state, images, labels, rows)
        loop = repeated(step, scan, config.parallel, mesh)

        def run(state, epoch):
            order = stream.permutation(config.seed, epoch, len(split.labels))
            order = order[: steps * config.batch_size].reshape(steps, config.batch_size)
            state, outputs = loop(state, images, labels, order)
            losses, counts = jax.device_get(outputs)
            return state, losses, jax.tree.map(lambda x: x.sum(0), counts), {}

    def train_epoch(state, epoch):
        state, losses, totals, more = run(state, epoch)
        metrics = {"train_loss": float(np.mean(losses, dtype=np.float64))}
        metrics |= {f"train_{name}": value for name, value in numbers(config, totals).items()}
        metrics["weight_norm"] = float(weight_norm(state.params))
        return state, metrics | {"learning_rate": float(rate(config, epoch - 1 / steps))} | more

    return train_epoch, scan


def streamed(config: Config, step: Callable, split: datasets.Split, mesh: Mesh, first: int, steps: int, stack) -> Callable:
    """An epoch of a stream that begins at step `first`: state, losses, totals, and how long it waited for data, in seconds."""
    mine, put = share(mesh, config.batch_size), functools.partial(spread, mesh, config.parallel)
    batches = stream.Batches(*split, config.seed, config.batch_size, mine)
    feed = stack.enter_context(contextlib.closing(stream.Feed(batches, first, config.epochs * steps, put)))
    compiled = mapped(step, config.parallel, mesh, split=True)
    add = jax.jit(lambda *trees: jax.tree.map(jnp.add, *trees))

    def run(state, _):
        losses, totals, waited = [], None, feed.waited
        for _ in range(steps):
            batch = next(feed)
            jax.block_until_ready(losses[-2:-1])  # a step runs and one waits: more would hold batches without use
            state, (loss, counts) = one_by_one(mesh, compiled(state, *batch))
            losses.append(loss)
            totals = add(totals, counts) if totals else counts
        return state, *jax.device_get((losses, totals)), {"waited": feed.waited - waited}

    return run


def varying(x) -> tuple[str, ...]:
    """The axes over whose devices x may differ, as far as `jax.shard_map` follows that; `jax.pmap` does not."""
    return tuple(jax.typeof(x).manual_axis_type.varying)


def apart(tree, device):
    """Copies that belong to each device alone, so that gradients with respect to them are those of its own loss."""
    return jax.tree.map(lambda x: lax.pcast(x, varying(device), to="varying"), tree) if varying(device) else tree


def uses_convolution(step: Callable, mesh: Mesh, *arguments) -> bool:
    return "stablehlo.convolution" in mapped(step, "jit", mesh).lower(*arguments).as_text()


def tallies(config: Config, outputs, targets, counted) -> dict:
    return {name: metric.tally(outputs, targets, counted) for name, metric in config.metrics.items()}


def numbers(config: Config, totals: Mapping) -> dict[str, float]:
    """The value of each metric, by name."""
    return {name: float(metric.value(totals[name])) for name, metric in config.metrics.items()}


def evaluation_program(config: Config, model: Model, mesh: Mesh) -> Callable:
    """A function of (variables, split) that gives the metrics and the mean loss, by name, and the total of each metric's tally.

    The batches come from the host, padded to one size, so that one compiled program serves every split; a thread makes the next
    one while one is computed.
    """

    def count(variables, x, y, counted):
        outputs = model.outputs(variables, x, train=False).astype(jnp.float32)
        loss = jnp.sum(config.loss(outputs, y), where=counted)
        return lax.psum((loss, tallies(config, outputs, y, counted)), "data")

    compiled = mapped(count, config.parallel, mesh, donate=False, split=True)

    def evaluate(variables, split):
        batch = -(-min(config.eval_batch_size, max(512, len(split.labels))) // mesh.size) * mesh.size
        mine = share(mesh, batch)

        def part(k):
            rows = k * batch + mine
            rows = rows[rows < len(split.labels)]
            whole = [np.pad(array, [(0, len(mine) - len(rows))] + [(0, 0)] * (array.ndim - 1))
                     for array in (np.asarray(split.images[rows]), split.labels[rows], np.ones(len(rows), bool))]
            return spread(mesh, config.parallel, whole)

        parts = stream.one_ahead(part, -(-len(split.labels) // batch))
        counts = []
        for whole in parts:
            jax.block_until_ready(counts[-2:-1])
            counts.append(one_by_one(mesh, compiled(variables, *whole)))
        loss, totals = jax.tree.map(lambda *parts: sum(parts), *jax.device_get(counts))
        return numbers(config, totals) | {"loss": float(loss) / len(split.labels)}, totals

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


def mapped(function: Callable, parallel: str, mesh: Mesh, donate: bool = True, options: Mapping | None = None,
           split: bool = False) -> Callable:
    """`function` compiled for all devices, with equal arguments and results on each; the first argument is donated. With
    `split` each device gets its share of all but the first argument, along their first axis, as `spread` lays them out."""
    options = pdo.compiler_options(mesh.devices.flat[0].platform) if options is None else dict(options)
    if parallel == "jit":
        same = PartitionSpec()
        specs = (same, PartitionSpec("data") if split else same)
        everywhere = jax.shard_map(lambda first, rest: function(first, *rest), mesh=mesh, in_specs=specs, out_specs=same)
        donated = 0 if donate else ()
        return jax.jit(lambda first, *rest: everywhere(first, rest), donate_argnums=donated, compiler_options=options)
    devices = spread(mesh, "jit", np.arange(jax.local_device_count()))  # pmap wants an argument that differs between them
    everywhere = jax.pmap(
        lambda _, first, rest: function(first, *rest),
        axis_name="data",
        in_axes=(0, None, 0 if split else None),
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


def share(mesh: Mesh, batch: int) -> np.ndarray:
    """The rows of a batch that the devices of this process take, in their order."""
    slices = NamedSharding(mesh, PartitionSpec("data")).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[rows] for rows in slices]))


def spread(mesh: Mesh, parallel: str, tree):
    """Arrays of a batch, of the rows that are this process's `share`, on its devices, for what `mapped` makes with `split`."""
    if parallel == "pmap":
        tree = jax.tree.map(lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), tree)
    shares = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(shares, x), tree)


# The model and its optimiser



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


def started_state(config: Config, model: Model, image_shape, variables: Mapping) -> State:
    """The state before the first step of a run that begins with the variables of another, factored where its network is."""
    new = jax.eval_shape(lambda: new_variables(model, jax.random.key(0), image_shape))
    params = kernels.factored(variables["params"], new["params"])
    chex.assert_trees_all_equal_shapes(variables["batch_stats"], new["batch_stats"])
    return state_of(config, {"params": params, "batch_stats": variables["batch_stats"]})


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
    return jnp.asarray(config.learning_rate(epoch, config.epochs) if callable(config.learning_rate) else config.learning_rate)


def squared_weights(params) -> jax.Array:
    """The sum of squares of every parameter named "kernel"."""
    leaves = jax.tree.leaves_with_path(params)
    return sum(jnp.sum(jnp.square(leaf)) for path, leaf in leaves if path[-1].key == "kernel")
