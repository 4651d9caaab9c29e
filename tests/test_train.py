"""The training loop against a plain one, killed and resumed, and on bad input."""

import json
import shutil
import time
import types
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from small_runs import Net, final_state, finish, flat, kill, make_config, make_data, shift, start, wait_for, write_config

import pdo_jax as pdo
from experiments import config as configs
from experiments import figures, measures, programs, saved, train
from experiments.baselines import MnistRotCNN, ResNetCNN
from experiments.config import piecewise
from experiments.workdir import TrainError, saved_epochs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: (config, workdir, result)."""
    workdir, config = tmp_path_factory.mktemp("run") / "new" / "folder", make_config()
    return config, workdir, train.train(config, workdir, make_data())


# The numbers


@pytest.mark.parametrize("changes", [{}, {"ema": 0.6, "label_smoothing": 0.3}], ids=["plain", "averaged, smoothed"])
def test_the_epoch_equals_a_plain_loop(run, tmp_path, changes):
    """Batches in the seeded order, remainder dropped; L2 on weights only; the rate changes at epoch 1; Adam. And what is
    evaluated is the average of weights, if the config has one."""
    config, workdir, _ = run
    data = make_data()
    if changes:
        config, workdir = make_config(**changes), tmp_path
        train.train(config, workdir, data)
    mean, deviation = data.train.images.mean(), data.train.images.std()
    model = programs.make_model(config, [mean], [deviation])
    state = programs.initial_state(config, model, (4, 4, 1))
    params, stats, moments = state.params, state.batch_stats, None

    def loss(params, stats, x, y):
        logits, changed = Net().apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        targets = (1 - config.label_smoothing) * jnp.eye(3)[y] + config.label_smoothing / 3
        nll = -(targets * jax.nn.log_softmax(logits)).sum(1).mean()
        weights = params["Dense_0"]["kernel"], params["Dense_1"]["kernel"]
        return nll + 0.5 * config.l2 * sum((w**2).sum() for w in weights), changed["batch_stats"]

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    steps, average = 0, [flat(params), flat(stats)]
    for epoch in (1, 2, 3):
        adam = optax.adam(1e-2 if epoch == 1 else 3e-3)
        moments = moments or adam.init(params)
        order = np.random.default_rng([config.seed, epoch]).permutation(70)[:64].reshape(4, 16)
        for rows in order:
            g, stats = gradient(params, stats, (data.train.images[rows] - mean) / deviation, data.train.labels[rows])
            updates, moments = adam.update(g, moments)
            params = optax.apply_updates(params, updates)
            keep = min(config.ema, (steps + 1) / (steps + 10))
            average = [keep * old + (1 - keep) * flat(new) for old, new in zip(average, (params, stats), strict=True)]
            steps += 1
    trained = final_state(workdir, config)
    assert trained.step == steps == 12
    for name, values in zip(("params", "batch_stats"), average, strict=True):
        np.testing.assert_allclose(flat(trained.variables[name]), values, rtol=2e-4, atol=2e-6)
    assert bool(trained.average) == bool(config.ema)
    np.testing.assert_allclose(flat(trained.params), flat(params), rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(flat(trained.batch_stats), flat(stats), rtol=2e-4, atol=2e-6)


def test_the_test_error_counts_every_image_once(run):
    """The padded last batch counts nothing, and the error is that of the last epoch's network."""
    config, workdir, result = run
    data = make_data()
    model = programs.make_model(config, [data.train.images.mean()], [data.train.images.std()])
    logits = model.outputs(final_state(workdir, config).variables, data.test.images, train=False)
    assert result["test_error"] == pytest.approx(np.mean(logits.argmax(-1) != data.test.labels))
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, data.test.labels).mean()
    assert result["test_loss"] == pytest.approx(float(nll), rel=1e-4)
    assert result["images"] == {"train": 70, "validation": 15, "test": 33}
    assert result["parameters"] == 16 * 8 + 8 + 8 + 8 * 3 + 3


def test_the_files_of_a_run(run):
    config, workdir, result = run
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3] and lines[-1]["learning_rate"] == pytest.approx(3e-3)
    assert lines[-1]["validation_error"] == result["validation_error"]
    assert json.loads((workdir / "result.json").read_text()) == json.loads(json.dumps(result))
    assert saved_epochs(workdir) == [2, 3]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert {Path(figure).stem for figure in result["figures"]} >= {"curves", "confusion"}
    for figure in result["figures"]:
        with Image.open(figure) as picture:
            assert min(picture.size) > 100


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_a_compiled_epoch_equals_a_python_loop(parallel):
    data, mesh = make_data(), programs.all_devices()
    ends = []
    for scan in (True, False):
        config = make_config(network=Net(dropout=0.3), augment=shift, parallel=parallel, scan=scan)
        model = programs.make_model(config, [0.5], [0.3])
        state = programs.place(mesh, programs.initial_state(config, model, (4, 4, 1)))
        program, used = programs.epoch_program(config, model, data.train, mesh, state)
        assert used is scan
        state, metrics = program(state, 1)
        ends.append(np.append(flat(state), list(metrics.values())))
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-6)


def test_a_compiled_loop_is_chosen_unless_convolutions_would_be_slow_in_it():
    """On a CPU XLA runs lax.conv some 30 times slower inside a loop."""
    mesh = programs.all_devices()
    for network, loops in ((Net(), True), (ResNetCNN(1, (2,), 3), jax.default_backend() != "cpu")):
        config = make_config(network=network)
        model = programs.make_model(config, [0.5], [0.3])
        state = programs.initial_state(config, model, (4, 4, 1))
        assert programs.epoch_program(config, model, make_data().train, mesh, state)[1] is loops


def test_steps_wait_for_one_another_on_several_cpu_devices_alone(monkeypatch):
    """Many collective programs under way end the process there; docs/chaos.md counts it."""
    waited, cpu = [], jax.devices("cpu")[:1]
    monkeypatch.setattr(jax, "block_until_ready", lambda outputs: waited.append(outputs) or outputs)
    for platform, size, expected in (("cpu", 1, 0), ("cpu", 2, 1), ("gpu", 2, 1)):
        device = cpu[0] if platform == "cpu" else types.SimpleNamespace(platform=platform)
        mesh = types.SimpleNamespace(devices=np.array([device], object), size=size)
        assert programs.one_by_one(mesh, "outputs") == "outputs" and len(waited) == expected


def test_bfloat16_computes_in_it_and_keeps_float32_weights():
    config = make_config(dtype="bfloat16")
    model = programs.make_model(config, [0.5], [0.3])
    state = programs.initial_state(config, model, (4, 4, 1))
    assert model.outputs(state.variables, make_data().test.images, train=False).dtype == jnp.bfloat16
    mesh = programs.all_devices()
    state, _ = programs.epoch_program(config, model, make_data().train, mesh, state)[0](programs.place(mesh, state), 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_baselines_have_the_sizes_they_say():
    def size(network, shape):
        variables = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))
        return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))

    assert size(MnistRotCNN(), (28, 28, 1)) == 21_620
    assert size(ResNetCNN(4), (32, 32, 3)) == 369_498  # depth 26; the paper's table says 0.37M
    assert size(ResNetCNN(7, (32, 64, 128)), (32, 32, 3)) == 2_636_074  # depth 44; 2.64M there


class Invariant(nn.Module):
    """A PDO-eConv and a mean over space and group."""

    group: pdo.groups.Group = pdo.groups.cyclic(4)

    @nn.compact
    def __call__(self, x, train: bool):
        x = pdo.LiftingConv(2, self.group, kernel_size=3)(x)
        return nn.Dense(3)(pdo.group_pool(nn.relu(x), self.group).mean((1, 2)))


def test_a_network_of_a_group_reports_its_equivariance_and_shows_its_stencils():
    """The logits stand still under quarter turns; the stencils of an orientation are those of the first, turned."""
    model = programs.Model(Invariant(), np.float32([0.4]), np.float32([0.2]))
    variables = programs.initial_state(make_config(network=Invariant()), model, (8, 8, 1)).variables
    images = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    errors = train.equivariance_error(model, variables, images)
    assert list(errors) == ["turn 0", "turn 90", "turn 180", "turn 270"] and max(errors.values()) < 1e-5
    assert measures.element_name(0, np.diag([1.0, -1.0])) == "mirror 0"
    assert train.equivariance_error(programs.Model(Net(), 0, 1), variables, images) is None
    kernels = figures.lifting_kernels(model.network, variables, (8, 8, 1))
    assert kernels.shape == (3, 3, 2, 4)
    for turns in range(4):
        np.testing.assert_allclose(kernels[..., turns], np.rot90(kernels[..., 0], turns), atol=1e-6)
    _, seen = model.network.apply(variables, images, False, capture_intermediates=True, mutable=["intermediates"])
    answer = seen["intermediates"]["LiftingConv_0"]["__call__"][0][0, 3, 4]
    np.testing.assert_allclose(answer, np.einsum("ijfa,ij->fa", kernels, images[0, 2:5, 3:6, 0]), atol=1e-5)


# Stopped, and killed


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """Killed in the middle of epoch 2, then while the next checkpoint is written; the average of weights is kept too, and the
    lines of metrics.jsonl stay one an epoch."""
    small_steps = {"batch_size": "2", "scan": "False", "ema": "0.9"}
    config = write_config(tmp_path / "config.py", "dropout=0.3", augment="shift", **small_steps)
    straight, workdir = tmp_path / "straight", tmp_path / "killed"
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    train.train(configs.load(config), straight)

    killed = start(config, workdir)
    wait_for(lambda: saved_epochs(workdir) == [1], killed)
    kill(killed)
    assert saved_epochs(workdir) == [1]

    killed = start(config, workdir)
    wait_for(lambda: any(path.name.startswith("2") for path in checkpoints.iterdir()), killed)
    kill(killed)
    assert saved_epochs(workdir) in ([1], [1, 2])  # the second if the writing was quicker than the kill
    assert not (workdir / "result.json").exists()
    metrics.write_text(metrics.read_text() + '{"epoch": 9')  # as if the kill had fallen into the writing of a line

    finish(start(config, workdir))
    np.testing.assert_array_equal(*(flat(saved.load(folder)[2]) for folder in (straight, workdir)))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    results = [json.loads((folder / "result.json").read_text()) for folder in (straight, workdir)]
    assert results[0]["test_loss"] == results[1]["test_loss"]


def test_a_run_that_stops_before_its_time_is_over_goes_on_to_the_same_bits(run, tmp_path, monkeypatch):
    """It stops between two epochs, and before the evaluation; the test set is read by the call that ends the run alone."""
    config, straight, result = run
    data = make_data()
    assert train.train(config, tmp_path, data, minutes=0) is None and saved_epochs(tmp_path) == []

    def unread(*arguments, program=programs.evaluation_program):
        evaluate = program(*arguments)
        return lambda variables, split: evaluate(variables, split if len(split.labels) == 15 else pytest.fail("test set read"))

    for epochs in (1, 3):
        with monkeypatch.context() as patched:
            patched.setattr(train, "time_for_more", lambda began, minutes, history, compiles, most=epochs: len(history) < most)
            patched.setattr(programs, "evaluation_program", unread)
            assert train.train(config, tmp_path, data, minutes=9) is None
        assert saved_epochs(tmp_path)[-1] == epochs and not (tmp_path / "result.json").exists()
    assert train.train(config, tmp_path, data, minutes=9)["test_loss"] == result["test_loss"]
    np.testing.assert_array_equal(*(flat(final_state(folder, config)) for folder in (straight, tmp_path)))


def test_no_epoch_is_begun_that_would_not_end_in_time():
    """It is taken to last as long as the last two, or, if it is yet to be compiled, as the first one too."""
    history = [{"seconds": 50.0}, {"seconds": 20.0}, {"seconds": 1.0}]
    began = time.perf_counter() - 60
    for minutes, enough in ((0.9, False), (1.7, False), (2.0, True), (float("inf"), True)):
        assert train.time_for_more(began, minutes, history, compiles=True) is enough
    assert train.time_for_more(began, 1.5, history, compiles=False) and not train.time_for_more(began, 1.3, history, False)
    assert not train.time_for_more(began, 0.5, [], compiles=True)


# A run that begins with another


class Ranked(nn.Module):
    """Its second layer has 8 × 18 kernels, of rank 8 at most."""

    features: int = 2
    rank: int | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        options = dict(group=pdo.groups.cyclic(4), kernel_size=3)
        x = pdo.LiftingConv(self.features, **options)(x)
        x = pdo.GroupConv(2, rank=self.rank, **options, name="conv")(nn.relu(x))
        return nn.Dense(3)(x.mean((1, 2)).reshape(len(x), -1))


FIRST = dict(network=Ranked(), epochs=2, batch_size=16, learning_rate=1e-2, eval_batch_size=10)


def started(**changes):
    """A run that begins with that of FIRST, at full rank, and learns next to nothing."""
    return make_config(**dict(network=Ranked(rank=8), start=FIRST, epochs=1, learning_rate=1e-12, l2=0.0) | changes)


def test_a_run_begins_with_the_weights_of_the_one_before_it(tmp_path):
    """That one is trained first, with the seed of the second, in the time that there is; the factors give its kernels again."""
    data, alone, workdir = make_data(), tmp_path / "alone", tmp_path / "run"
    config = started(seed=3)
    before = train.train(make_config(**FIRST, l2=0.0, seed=3), alone, data)
    assert train.train(config, workdir, data, minutes=0) is None and saved_epochs(workdir / "start") == []
    result = train.train(config, workdir, data)
    first, last = (saved.load(folder, given).variables["params"]
                   for folder, given in ((alone, make_config(**FIRST, l2=0.0, seed=3)), (workdir, config)))
    kernel = np.asarray(first["conv"].pop("kernel"))
    found = pdo.kernels.product(last["conv"].pop("mix"), last["conv"].pop("kernel"))
    np.testing.assert_allclose(found, kernel, atol=1e-5)
    np.testing.assert_allclose(flat(last), flat(first), atol=1e-6)
    assert result["start"]["test_loss"] == before["test_loss"] and abs(result["test_loss"] - before["test_loss"]) < 1e-5
    assert result["start"]["parameters"] == before["parameters"]
    assert result["train_seconds"] > result["start"]["train_seconds"] > 0

    (workdir / "result.json").rename(tmp_path / "result.json")  # once it has begun, it needs that one no more
    (workdir / "start").rename(tmp_path / "start")
    assert train.train(config, workdir, data)["test_loss"] == result["test_loss"]
    (tmp_path / "start").rename(workdir / "start")

    other = tmp_path / "other"  # a finished one serves another run
    shutil.copytree(workdir / "start", other / "start")
    lines = (other / "start" / "metrics.jsonl").stat().st_mtime_ns
    assert train.train(config, other, data)["test_loss"] == result["test_loss"]
    assert (other / "start" / "metrics.jsonl").stat().st_mtime_ns == lines
    shutil.copytree(workdir / "start", tmp_path / "third" / "start")
    with pytest.raises(TrainError, match="other data"):
        train.train(config, tmp_path / "third", data._replace(train=data.train._replace(labels=data.train.labels[::-1].copy())))


@pytest.mark.parametrize("first, message", [
    (dict(network=Ranked(features=3)), r"start fails: ValueError: kernel has shape"),
    (dict(network=Ranked(), epochs=0), "start: epochs is 0"), (dict(epochs=1), "start: the config has no network")])
def test_a_start_that_does_not_fit_is_refused_before_it_is_trained(tmp_path, first, message):
    with pytest.raises((TrainError, configs.ConfigError), match=message):
        train.train(started(start=first), tmp_path, make_data())
    assert not (tmp_path / "start").exists()


# Bad input


def test_a_finished_run_is_not_trained_again(run):
    config, workdir, result = run
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    assert train.train(config, workdir, make_data())["test_error"] == result["test_error"]
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TrainError, match="belong to no run, such as thesis.tex"):
        train.train(make_config(), tmp_path, make_data())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_folder_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(dataset="no such data set")
    with pytest.raises(TrainError, match="cannot write to the folder .*/file/run: Not a directory; choose another"):
        train.train(config, tmp_path / "file" / "run")
    with pytest.raises(TrainError, match="cannot write to the folder /proc/run"):
        train.train(config, Path("/proc/run"))


def test_unknown_data_sets_are_refused(tmp_path):
    with pytest.raises(TrainError, match="mnist_rot/subset"):
        train.train(make_config(dataset="mnist_rot/subsett"), tmp_path)


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = make_config(learning_rate=partial(piecewise, {0: 1e-3, 2: 1e30}))
    with pytest.raises(TrainError, match="diverged in epoch 3.*checkpoint of epoch 2 is kept"):
        train.train(config, tmp_path, make_data())
    assert saved_epochs(tmp_path)[-1] == 2
    assert np.isfinite(flat(final_state(tmp_path, config))).all()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path):
    config = make_config(epochs=2)
    train.train(config, tmp_path, make_data())
    (tmp_path / "result.json").unlink()
    for path in (tmp_path / "checkpoints" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * 7)
    with pytest.raises(TrainError, match="cannot read the checkpoint .*/checkpoints/2(.|\n)*move that folder away"):
        train.train(config, tmp_path, make_data())
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "damaged")
    train.train(config, tmp_path, make_data())
    assert saved_epochs(tmp_path) == [1, 2]
